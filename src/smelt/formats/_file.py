"""An open `.smelt` file: what it says, and its tensors one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.core.edit import Edit, Keep, from_plain
from smelt.core.encoded import Encoded, awaken
from smelt.core.errors import FileError, nearest
from smelt.core.named import first_line
from smelt.formats._container import Container
from smelt.formats._meta import Node, Reader, Resting, brief, pairs

# A file with n bytes of leaves may claim at most 2^24 + 2^14 n elements (a pruned tensor takes few bytes).
ELEMENTS, ELEMENTS_PER_BYTE = 1 << 24, 1 << 14

KEYS: dict[str, type] = {
    **{"builder": str, "arguments": dict, "edits": list, "tensors": list, "activations": list},
    **{"recipe": object, "report": object},
}


class File:
    """Its meta is read and judged at once; a leaf's checksum is checked when it is first read.

    Tensors lie on the mapped file where they can; writing to them does not change it.  While it is open the file
    may be replaced, as `save` does, but not be cut off or written over in place.

    Args:
        own: give tensors memory of their own.

    Raises:
        FileError: no file, a foreign, damaged or newer one.
    """

    def __init__(self, path: str | Path, *, own: bool = False):
        self._container = Container(path)
        self._own = own
        self._reader = reader = Reader()
        self._roots: dict[str, Node | int] = {}
        self._spans: dict[str, range] = {}
        self._leaves: dict[int, Tensor] = {}
        self._nodes: dict[Node, Encoded] = {}
        self._memo: dict[int, Any] = {}
        with self.blame("damaged"):
            self._meta = _judged(self._container.meta)
        for name, data in self._pairs().items():
            with self.blame(f"damaged: tensor {brief(name)}"):
                begin = len(reader.slots)
                self._roots[name] = reader.part(data)
                self._spans[name] = range(begin, len(reader.slots))
        with self.blame("damaged"):
            self.activations = [Resting.read(data, reader) for data in self._meta.get("activations", [])]
            self._container.place(reader.slots)
            self.most = ELEMENTS + ELEMENTS_PER_BYTE * self.leaf_bytes
            reader.check(self.most)
            if sum(reader.slot(root).numel for root in self._roots.values()) > self.most:
                raise FileError("it claims implausibly many elements")

    def _pairs(self) -> dict[str, Any]:
        with self.blame("damaged"):
            return pairs(self._meta.get("tensors", []))

    def error(self, text: str) -> FileError:
        return self._container.error(text)

    @contextmanager
    def blame(self, where: str) -> Iterator[None]:
        """Whatever goes wrong within is a FileError that names the file and `where`."""
        try:
            yield
        except FileError as error:
            raise self.error(f"{where}: {error}") from None
        except Exception as error:
            raise self.error(f"{where}: {type(error).__name__}: {first_line(error)}") from error

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; tensors that lie on it keep it mapped."""
        self._container.close()
        self._leaves, self._nodes, self._memo = {}, {}, {}

    @property
    def path(self) -> Path:
        return self._container.path

    @property
    def version(self) -> int:
        return self._container.version

    @property
    def builder(self) -> str | None:
        """A name on the shelf `models/`, or 'module:function'."""
        return self._meta.get("builder")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self._meta.get("arguments", {}))

    @property
    def edits(self) -> list[Edit]:
        return self.read_edits(ELEMENTS)

    @property
    def recipe(self) -> Any:
        return self._meta.get("recipe")

    @property
    def report(self) -> Any:
        return self._meta.get("report")

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._container.nbytes

    @property
    def leaf_bytes(self) -> int:
        return sum(slot.nbytes for slot in self._reader.slots)

    def names(self) -> list[str]:
        return list(self._roots)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._reader.slot(self._root(name)).shape)

    def numel(self, name: str) -> int:
        return self._reader.slot(self._root(name)).numel

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.slot(self._root(name)).dtype

    def rest_bytes(self, name: str) -> int:
        """Bytes of a tensor's leaves in the file; a shared leaf counts for the first tensor that has it."""
        self._root(name)
        return sum(self._reader.slots[i].nbytes for i in self._spans[name])

    def resting(self, name: str) -> Tensor | Encoded:
        """The tensor as it lies in the file."""
        with self.blame(f"damaged: tensor {name!r}"):
            return self._part(self._root(name))

    def encoded(self, name: str) -> Tensor | Encoded:
        """The tensor as it is in memory: a tree, or a plain tensor."""
        resting = self.resting(name)
        with self.blame(f"tensor {name!r} cannot be decoded"):
            awake = awaken(resting, self._memo)
            if awake.shape != resting.shape or awake.dtype != resting.dtype:
                raise FileError(f"it awakens as {list(awake.shape)} {awake.dtype}")
            return awake

    def tensor(self, name: str) -> Tensor:
        """The dense tensor."""
        return self.dense(name, self.encoded(name))

    def dense(self, name: str, awake: Tensor | Encoded) -> Tensor:
        """The dense tensor of what `encoded(name)` gave."""
        if isinstance(awake, Tensor):
            return awake
        with self.blame(f"tensor {name!r} cannot be decoded"):
            dense = awake.decode()
            if dense.shape != awake.shape:
                raise FileError(f"it decodes to {list(dense.shape)}")
            return dense

    def leaf(self, i: int) -> Tensor:
        """A leaf by its number; one that is used twice is one tensor."""
        if i in self._leaves:
            return self._leaves[i]
        leaf = self._container.leaf(i, own=self._own)
        if self._reader.uses[i] > 1:
            self._leaves[i] = leaf
        return leaf

    def verify(self) -> None:
        """Check the checksum of every leaf.  Raises FileError."""
        with self.blame("damaged"):
            self._container.verify()

    def read_edits(self, most: int) -> list[Edit]:
        """The edits; raises FileError for more than `most` positions to keep in all."""
        found = []
        with self.blame("its edits"):
            for data in self._meta.get("edits", []):
                edit = from_plain(data, most)
                most -= len(edit.index) if isinstance(edit, Keep) else 0
                found.append(edit)
        return found

    def _root(self, name: str) -> Node | int:
        if name not in self._roots:
            raise self.error(f"no tensor {name!r}{nearest(name, self._roots)}")
        return self._roots[name]

    def _part(self, part: Node | int) -> Tensor | Encoded:
        if isinstance(part, int):
            return self.leaf(part)
        if part in self._nodes:
            return self._nodes[part]
        parts = {k: self._part(p) for k, p in part.parts.items()}
        node = Encoded(part.form, parts, torch.Size(part.slot.shape), part.slot.dtype)
        if part in self._reader.shared:
            self._nodes[part] = node
            self._memo.setdefault(id(node), None)
        return node


def _judged(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise FileError("its meta is no mapping")
    for key, value in meta.items():
        if key not in KEYS or not isinstance(value, KEYS[key]):
            raise FileError(f"{brief(key)}: {brief(value)} has no place in the meta")
    return meta
