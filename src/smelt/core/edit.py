"""Edits: changes to a model's structure, as plain data.

    keep(tensor, dim, index)             keep these slices of a tensor
    set(path, attribute, value)          e.g. set('fc1', 'out_features', 200)
    replace(path, builder, arguments)    a module becomes what a builder on the shelf `models/` makes
    remove(path)                         a module becomes Identity
    members(path, index)                 keep these members of a ModuleList, which close ranks
    tie(a, b)                            tensor b becomes tensor a
    fill(tensor, value)                  new values; not recorded, since in a file they are the leaves
    stored(tensor, encoded)              a tensor is stored as a tree; not recorded, since the file holds it
    note(tensor, reason)                 nothing; the report says why a tensor is left as it is; not recorded

A file records them and loading replays them on the `meta` device, then fills the leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.encoded import Encoded
from smelt.core.errors import FileError, ModelError
from smelt.core.target import Target, targets

PLAIN = (bool, int, float, str)


class Edit(ABC):
    kind: ClassVar[str]
    recorded: ClassVar[bool] = True

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change `model` in place.  Raises ModelError when it does not fit, and then changes nothing."""

    @abstractmethod
    def touches(self, model: nn.Module) -> set[str]:
        """Names of the targets whose values or shapes this edit changes."""

    def to_plain(self) -> list[Any]:
        return [self.kind, *(getattr(self, f.name) for f in fields(self) if f.repr)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Keep(Edit):
    """`index`: positions along `dim` to keep, in rising order.  The tensor may be a buffer that is not persistent."""

    kind = "keep"
    tensor: str
    dim: int
    index: tuple[int, ...]

    def apply(self, model: nn.Module) -> None:
        self.cut(model, find(model, self.tensor, transient=True))

    def cut(self, model: nn.Module, target: Target) -> Tensor:
        """`apply` where the target is known; returns what stands in its place."""
        size = target.tensor.shape[self.dim] if -target.tensor.dim() <= self.dim < target.tensor.dim() else -1
        if not self.index or any(not 0 <= i < size for i in self.index):
            raise ModelError(f"edit keep: {target} has no such positions along dimension {self.dim}")
        index = torch.tensor(self.index, device=target.tensor.device)
        return put(model, target, target.tensor.detach().index_select(self.dim, index))

    def touches(self, model: nn.Module) -> set[str]:
        return {find(model, self.tensor, transient=True).name}

    def to_plain(self) -> list[Any]:
        return [self.kind, self.tensor, self.dim, to_ranges(self.index)]


@dataclass(frozen=True)
class Set(Edit):
    kind = "set"
    path: str
    attribute: str
    value: Any

    def apply(self, model: nn.Module) -> None:
        module = submodule(model, self.path)
        old: Any = getattr(module, self.attribute, None)
        fits = isinstance(old, PLAIN) and type(old) is type(self.value)
        if (
            type(old) in (tuple, list)
            and all(isinstance(v, int) for v in old)
            and isinstance(self.value, (list, tuple))
        ):
            fits = len(old) == len(self.value) and all(type(v) is int for v in self.value)
        if self.attribute.startswith("_") or not fits:
            raise ModelError(f"edit set: {self.path}.{self.attribute} cannot become {self.value!r}")
        setattr(module, self.attribute, type(old)(self.value) if isinstance(old, (tuple, list)) else self.value)

    def touches(self, model: nn.Module) -> set[str]:
        return set()


@dataclass(frozen=True)
class Replace(Edit):
    """`builder`: a name on the shelf `models/`; `arguments`: plain data; `values`: state dict of the new module."""

    kind = "replace"
    path: str
    builder: str
    arguments: Mapping[str, Any]
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def apply(self, model: nn.Module) -> None:
        old = submodule(model, self.path)
        new = shelf.module("models", self.builder).build(**self.arguments)
        if not isinstance(new, nn.Module):
            raise ModelError(f"edit replace: models.{self.builder} built no module for {self.path!r}")
        like = next((t for t in (*old.parameters(), *model.parameters()) if t.is_floating_point()), torch.empty(0))
        new = new.to(like.device, like.dtype)
        if self.values:
            new.load_state_dict(dict(self.values), strict=True)
        put_module(model, self.path, new.train(old.training))

    def touches(self, model: nn.Module) -> set[str]:
        return below(model, self.path)


@dataclass(frozen=True)
class Remove(Edit):
    kind = "remove"
    path: str

    def apply(self, model: nn.Module) -> None:
        submodule(model, self.path)
        put_module(model, self.path, nn.Identity())

    def touches(self, model: nn.Module) -> set[str]:
        return below(model, self.path)


@dataclass(frozen=True)
class Members(Edit):
    """`index`: which members of the ModuleList at `path` stay, in rising order; they are numbered anew."""

    kind = "members"
    path: str
    index: tuple[int, ...]

    def apply(self, model: nn.Module) -> None:
        members = submodule(model, self.path)
        if (
            not isinstance(members, nn.ModuleList)
            or not self.index
            or not 0 <= min(self.index) <= max(self.index) < len(members)
        ):
            raise ModelError(f"edit members: {self.path!r} is no ModuleList with such members")
        kept = [members[i] for i in self.index]
        members._modules.clear()
        members.extend(kept)

    def touches(self, model: nn.Module) -> set[str]:
        return below(model, self.path)  # the names of those that stay change, too

    def to_plain(self) -> list[Any]:
        return [self.kind, self.path, to_ranges(self.index)]


@dataclass(frozen=True)
class Tie(Edit):
    """Tensor `b` becomes the same tensor as `a`."""

    kind = "tie"
    a: str
    b: str

    def apply(self, model: nn.Module) -> None:
        a, b = find(model, self.a), find(model, self.b)
        if a.tensor.shape != b.tensor.shape:
            raise ModelError(f"edit tie: {a} and {b} differ in shape")
        for path, name in b.places:
            submodule(model, path)._parameters[name] = a.tensor  # type: ignore[assignment]

    def touches(self, model: nn.Module) -> set[str]:
        return {find(model, self.a).name, find(model, self.b).name}


@dataclass(frozen=True)
class Fill(Edit):
    kind = "fill"
    recorded = False
    tensor: str
    value: Tensor = field(repr=False, compare=False)

    def apply(self, model: nn.Module) -> None:
        target = find(model, self.tensor)
        put(model, target, self.value.to(target.tensor.device, target.tensor.dtype))

    def touches(self, model: nn.Module) -> set[str]:
        return {find(model, self.tensor).name}


@dataclass(frozen=True)
class Stored(Edit):
    """For tensors that other edits bring in; `store.apply_edits` lets them be what `encoded` says."""

    kind = "stored"
    recorded = False
    tensor: str
    encoded: Encoded = field(repr=False, compare=False)

    def apply(self, model: nn.Module) -> None:
        Fill(self.tensor, self.encoded.decode()).apply(model)

    def touches(self, model: nn.Module) -> set[str]:
        return {self.tensor}


@dataclass(frozen=True)
class Note(Edit):
    """For what a Rewrite leaves alone, wholly or in part: `reason` completes 'fc1.weight stays as it is: ...'.

    With `tensor` '' it is about the step as a whole.
    """

    kind = "note"
    recorded = False
    tensor: str
    reason: str

    def apply(self, model: nn.Module) -> None:
        pass

    def touches(self, model: nn.Module) -> set[str]:
        return set()


_KINDS: dict[str, type[Edit]] = {c.kind: c for c in (Keep, Set, Replace, Remove, Members, Tie)}


def from_plain(data: Any, most: int = 1 << 24) -> Edit:
    """The inverse of `to_plain`, for data from a file that nobody vouches for.

    Args:
        most: positions that one `keep` may name.

    Raises:
        FileError: not an edit.
    """
    try:
        kind, *values = data
        cls = _KINDS[kind]
        if cls in (Keep, Members):
            values[-1] = from_ranges(values[-1], most)
        edit = cls(*values)
        texts = {Keep: ("tensor",), Set: ("path", "attribute"), Replace: ("path", "builder")}
        texts |= {Remove: ("path",), Members: ("path",)}
        if not all(isinstance(getattr(edit, name), str) for name in texts.get(cls, ("a", "b"))):
            raise TypeError("a name that is not text")
        if isinstance(edit, Replace) and not isinstance(edit.arguments, Mapping):
            raise TypeError("arguments that are no mapping")
        return edit
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise FileError(f"the file holds something that is no edit: {str(data)[:80]!r} ({error})") from None


def apply_all(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Apply edits one after another.  Thousands of cuts in a row look for the tensors of the model once."""
    known: dict[str, Target] = {}
    for edit in edits:
        if not isinstance(edit, Keep):
            edit.apply(model)
            known = known if isinstance(edit, (Set, Note)) else {}
            continue
        known = known or {_full(place): t for t in targets(model, transient=True) for place in t.places}
        if edit.tensor not in known:
            raise ModelError(f"the model has no tensor {edit.tensor!r}")
        target = known[edit.tensor]
        cut = replace(target, tensor=edit.cut(model, target))
        known |= {_full(place): cut for place in target.places}


def _full(place: tuple[str, str]) -> str:
    return ".".join(part for part in place if part)


def to_ranges(index: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> '0-2,5'"""
    spans: list[list[int]] = []
    for i in index:
        if spans and i == spans[-1][1] + 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def from_ranges(text: str, most: int = 1 << 24) -> tuple[int, ...]:
    """'0-2,5' -> (0, 1, 2, 5); ValueError unless rising, below 2^24 and at most `most`."""
    index: list[int] = []
    for span in text.split(","):
        first, _, last = span.partition("-")
        a, b = int(first), int(last or first)
        if not (index[-1] if index else -1) < a <= b < 1 << 24:
            raise ValueError(f"positions {span!r}")
        if len(index) + b + 1 - a > most:
            raise ValueError("too many positions")
        index.extend(range(a, b + 1))
    return tuple(index)


def submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"the model has no module {path!r}") from None


def put_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Exchange a module at every place where it stands."""
    old = submodule(model, path)
    if old is model:
        raise ModelError("an edit cannot exchange the whole model")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def find(model: nn.Module, name: str, *, transient: bool = False) -> Target:
    """The target with a place of this name; with `transient`, any buffer."""
    for target in targets(model, transient=transient):
        if any((f"{path}.{n}" if path else n) == name for path, n in target.places):
            return target
    raise ModelError(f"the model has no tensor {name!r}")


def put(model: nn.Module, target: Target, value: Tensor) -> Tensor:
    """Exchange a tensor, of whatever shape, at all of its places; returns what stands there now."""
    new: Tensor = nn.Parameter(value, target.tensor.requires_grad) if target.parameter else value
    for path, name in target.places:
        owner = submodule(model, path)
        (owner._parameters if target.parameter else owner._buffers)[name] = new  # type: ignore[assignment]
        if isinstance(owner, nn.RNNBase):
            setattr(owner, name, new)  # keeps its list of flat weights true
    return new


def below(model: nn.Module, path: str) -> set[str]:
    """Names of the targets of a module and of all below it."""
    inside = {id(t) for t in (*submodule(model, path).parameters(), *submodule(model, path).buffers())}
    return {t.name for t in targets(model) if id(t.tensor) in inside}
