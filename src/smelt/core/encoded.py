"""A tensor stored in another form.

    Encoded(sparse)                      a node: a form and its parts
    ├── mask     bool  [300, 784]        a part is a tensor (a leaf) ...
    └── values   Encoded(codebook)       ... or another node
        ├── codebook  float32 [32]
        └── indices   uint8 [300, 784]

A `Form` knows only how to decode.  Files, kernels and exporters know forms; how a tensor got there (the
method) is forgotten.  Leaves may be shared between trees: identity counts, and a file stores them once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from smelt.core.errors import FileError


class Form(ABC):
    """How a tensor is stored: one file in `forms/`, a frozen dataclass whose fields are plain settings.

    `values`: the parts that carry the values (what a later lossy codec may eat if it is floating);
    the others are side data (masks, scales, codebooks).
    `aligned`: the parts that have one entry per element of the tensor, in its layout; where a mask
    stands above them in the tree, their masked entries are dropped at rest.
    """

    sealed: ClassVar[bool] = False
    """Whether its leaves carry checksums of their own; a file adds none."""

    version: ClassVar[int] = 1
    values: ClassVar[tuple[str, ...]] = ()
    aligned: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The form's file name on its shelf, e.g. 'codebook'."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense tensor.

        Args:
            parts: the parts, already decoded.
            shape: shape of the result.
            dtype: dtype of the result.  A lossless form must restore it; a lossy one may return any
                floating dtype, the caller casts.
        """

    def check(self, parts: Mapping[str, tuple[torch.Size, torch.dtype]], shape: torch.Size, dtype: torch.dtype) -> None:
        """Raise FileError if parts of these shapes and dtypes cannot be decoded to `shape`.

        Called before anything is decoded or allocated, on values from a file that nobody vouches for.
        Must also bound the result: a part of n bytes may not claim an unbounded number of elements.
        """
        missing = set(self.values) - set(parts)
        if missing:
            raise FileError(f"form {self.name!r} lacks its part {sorted(missing)[0]!r}")

    def where(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """A boolean mask in the tensor's layout of what is kept, if this form drops elements."""
        return None

    def at_rest(self, encoded: Encoded) -> list[Encoded]:
        """Candidates for how this node lies in a file; the writer takes the smallest after coding."""
        return [encoded]

    def awake(self, encoded: Encoded) -> Tensor | Encoded:
        """The inverse of `at_rest`; called with parts that are awake.  A lossless form gives the leaf itself.

        Values that only the elements can tell are checked here, once.  Raises FileError.
        """
        return encoded


@dataclass(frozen=True, eq=False)
class Encoded:
    """One node of the tree.  `decode()` gives a tensor of `shape` and `dtype`."""

    form: Form
    parts: Mapping[str, Tensor | Encoded]
    shape: torch.Size
    dtype: torch.dtype

    def decode(self) -> Tensor:
        dense = {k: p.decode() if isinstance(p, Encoded) else p for k, p in self.parts.items()}
        return self.form.decode(dense, self.shape, self.dtype).to(self.dtype)

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """('values.indices', tensor), ... in a fixed order."""
        for key, part in self.parts.items():
            if isinstance(part, Encoded):
                yield from part.leaves(f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", part

    def carriers(self, prefix: str = "") -> Iterator[str]:
        """Paths of the leaves that carry the values, floating or not."""
        for key in self.form.values:
            part = self.parts[key]
            if isinstance(part, Encoded):
                yield from part.carriers(f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    def map(self, change: Callable[[str, Tensor], Tensor | Encoded], prefix: str = "") -> Encoded:
        """The same tree with every leaf exchanged for `change(path, leaf)`."""
        parts = {
            k: p.map(change, f"{prefix}{k}.") if isinstance(p, Encoded) else change(f"{prefix}{k}", p)
            for k, p in self.parts.items()
        }
        return Encoded(self.form, parts, self.shape, self.dtype)

    def where(self) -> Tensor | None:
        """The mask of what is kept, in the tensor's layout, or None when nothing is dropped."""
        kept = self.form.where({k: p for k, p in self.parts.items() if isinstance(p, Tensor)})
        for key in self.form.values:
            part = self.parts[key]
            inner = part.where() if isinstance(part, Encoded) else None
            if inner is not None:
                kept = inner if kept is None else kept & inner
        return kept

    def nbytes(self) -> int:
        """Bytes of all leaves as they are in memory, shared ones once (a file adds a header)."""
        return sum({id(leaf): leaf.numel() * leaf.element_size() for _, leaf in self.leaves()}.values())

    def __str__(self) -> str:
        inner = ", ".join(f"{k}: {p}" for k, p in self.parts.items() if isinstance(p, Encoded))
        return self.form.name + (f"({inner})" if inner else "")


def numel(shape: Any) -> int:
    """Elements of a shape, as a Python int that cannot overflow."""
    return math.prod(int(n) for n in shape)


def awaken(node: Tensor | Encoded, memo: dict[int, Any] | None = None) -> Tensor | Encoded:
    """Undo what was done for the file: lossless forms decoded, masked entries back in place.

    Args:
        memo: its keys are the ids of nodes that several trees share, its values at first None; such a node is
            awakened once and kept here, so that what it gives is shared again.

    Raises:
        FileError: an element that its form forbids, or an aligned part that is not in its tensor's layout after all.
    """
    awake = _awaken(node, {} if memo is None else memo)
    _check_layout(awake)
    return awake


def _awaken(node: Tensor | Encoded, memo: dict[int, Any]) -> Tensor | Encoded:
    if not isinstance(node, Encoded):
        return node
    if memo.get(id(node)) is not None:
        return memo[id(node)]  # type: ignore[no-any-return]
    parts = {k: _awaken(p, memo) for k, p in node.parts.items()}
    awake = node.form.awake(Encoded(node.form, parts, node.shape, node.dtype))
    if id(node) in memo:
        memo[id(node)] = awake
    return awake


def _check_layout(node: Tensor | Encoded) -> None:
    if isinstance(node, Encoded):
        for key, part in node.parts.items():
            if key in node.form.aligned and part.shape != node.shape:
                sizes = f"{list(part.shape)}, the tensor {list(node.shape)}"
                raise FileError(f"form {node.form.name!r}: its part {key!r} is {sizes}")
            _check_layout(part)
