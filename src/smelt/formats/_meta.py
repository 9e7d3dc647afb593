"""Trees, edits and activations of a `.smelt` file as plain data, both ways; the grammar is in docs/format.md."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from smelt.core import shelf
from smelt.core.encoded import Encoded, Form
from smelt.core.errors import FileError, ModelError, RecipeError
from smelt.core.method import Codec, State, make
from smelt.core.named import first_line
from smelt.core.settings import build, check, ramps
from smelt.core.store import Activation
from smelt.formats._container import DTYPES, ELEMENTS, SHORT, Slot

# What a type is relative to at the top of a tree.
ROOT = Slot(torch.float32, ())
DIMENSIONS = 32


@dataclass(frozen=True, eq=False)
class Node:
    """A node of a file's tree: like Encoded, with the numbers of the leaves in place of tensors."""

    form: Form
    parts: Mapping[str, Node | int]
    slot: Slot

    def leaves(self) -> Iterator[int]:
        for part in self.parts.values():
            yield from part.leaves() if isinstance(part, Node) else (part,)

    def forms(self) -> Iterator[str]:
        yield self.form.name
        for part in self.parts.values():
            yield from part.forms() if isinstance(part, Node) else ()

    def __str__(self) -> str:
        inner = ", ".join(f"{k}: {p}" for k, p in self.parts.items() if isinstance(p, Node))
        return self.form.name + (f"({inner})" if inner else "")


class Writer:
    """Turns trees to plain data and numbers their leaves; a leaf met again is referred to."""

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []
        self._known: dict[int, int] = {}
        self._open: set[int] = set()

    @property
    def sealed(self) -> set[int]:
        """Numbers of the leaves that carry checksums of their own wherever they stand."""
        return set(range(len(self.leaves))) - self._open

    def part(self, part: Tensor | Encoded, above: Slot = ROOT, sealed: bool = False) -> Any:
        slot = Slot(part.dtype, tuple(part.shape))
        if isinstance(part, Encoded):
            name = part.form.name
            _check_on_shelf("forms", name, part.form, Form)
            if part.form.version != 1:
                name += f"@{part.form.version}"
            kept = part.form.sealed
            pieces = [x for key, inner in part.parts.items() for x in (key, self.part(inner, slot, kept))]
            return [name, settings_of(part.form), _type(slot, above), *pieces]
        known = id(part) in self._known
        number = self._known.setdefault(id(part), len(self.leaves))
        if not sealed:
            self._open.add(number)
        if known:
            return -1 - number
        self.leaves.append(part)
        return _type(slot, above)

    def activation(self, one: Activation) -> list[Any]:
        _check_on_shelf("methods", one.codec.name, one.codec, Codec)
        if any(True for _ in one.state.children()):
            raise ModelError(f"{one.path}: a file cannot hold a state of modules within modules")
        tensors = {**one.state._buffers, **one.state._parameters}
        pieces = [x for k, t in tensors.items() for x in (k, False if t is None else self.part(t.detach()))]
        return [one.path, one.at, one.codec.name, settings_of(one.codec), pieces, list(one.state._parameters)]


def _check_on_shelf(name: str, key: str, thing: Any, kind: type) -> None:
    try:
        found = shelf.load(name, key, kind)
    except RecipeError:
        found = None
    if found is not type(thing):
        raise ModelError(f"{type(thing).__name__} is not on the shelf {name!r} as {key!r}; no file could be read again")


def settings_of(thing: Any) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    found = {}
    for f in fields(thing):
        value = getattr(thing, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if type(value) is not type(default) or value != default:
            found[f.name] = list(value) if isinstance(value, tuple) else value
    return found


def _type(slot: Slot, above: Slot) -> Any:
    if slot == above:
        return None
    if slot.dtype not in SHORT:
        raise ModelError(f"a file cannot hold a tensor of {slot.dtype}")
    if slot.dtype == torch.uint8 and len(slot.shape) == 1:
        return slot.shape[0]
    if slot.shape == above.shape:
        return SHORT[slot.dtype]
    return [*([] if slot.dtype == above.dtype else [SHORT[slot.dtype]]), *slot.shape]


def read_type(data: Any, above: Slot) -> Slot:
    """The inverse of `_type`.  Raises FileError."""
    shape: tuple[int, ...]
    if data is None:
        return above
    if type(data) is int:
        dtype, shape = torch.uint8, (data,)
    elif isinstance(data, str):
        dtype, shape = _dtype(data), above.shape
    elif isinstance(data, list):
        named = bool(data) and isinstance(data[0], str)
        dtype, shape = (_dtype(data[0]), tuple(data[1:])) if named else (above.dtype, tuple(data))
    else:
        raise FileError(f"{brief(data)} is no type")
    if len(shape) > DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise FileError(f"{brief(data)} is no shape")
    if math.prod(max(n, 1) for n in shape) > ELEMENTS:
        raise FileError(f"{brief(data)} is implausibly large")
    return Slot(dtype, shape)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise FileError(f"unknown dtype {brief(name)}")
    return DTYPES[name]


class Reader:
    """The inverse of Writer; every method raises FileError.  Nodes with the same leaves become one node."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.uses: list[int] = []
        self.nodes: dict[Any, Node] = {}
        self.shared: set[Node] = set()
        self._forms: dict[tuple[str, str], Form] = {}
        self._open: set[int] = set()

    @property
    def sealed(self) -> set[int]:
        """See `Writer.sealed`."""
        return set(range(len(self.slots))) - self._open

    def part(self, data: Any, above: Slot = ROOT, sealed: bool = False) -> Node | int:
        """A node, or the number of a leaf."""
        if isinstance(data, list) and len(data) > 1 and isinstance(data[1], dict):
            return self._node(data, above)
        if type(data) is int and data < 0:
            if -data > len(self.slots):
                raise FileError(f"a reference to leaf {-1 - data}, which is not yet there")
            self.uses[-1 - data] += 1
            number = -1 - data
        else:
            self.slots.append(read_type(data, above))
            self.uses.append(1)
            number = len(self.slots) - 1
        if not sealed:
            self._open.add(number)
        return number

    def _node(self, data: list[Any], above: Slot) -> Node:
        if len(data) < 3:
            raise FileError(f"{brief(data)} is no node")
        name, settings, kind, *pieces = data
        if not isinstance(name, str):
            raise FileError(f"{brief(name)} is no form")
        spelt = (name, json.dumps(settings))
        form = self._forms[spelt] = self._forms.get(spelt) or _form(name, settings)
        slot = read_type(kind, above)
        parts = {key: self.part(piece, slot, form.sealed) for key, piece in pairs(pieces).items()}
        same = tuple((k, id(part) if isinstance(part, Node) else part) for k, part in parts.items())
        key = (*spelt, slot, same)
        if key in self.nodes:
            self.shared.add(self.nodes[key])
        return self.nodes.setdefault(key, Node(form, parts, slot))

    def slot(self, part: Node | int) -> Slot:
        return part.slot if isinstance(part, Node) else self.slots[part]

    def check(self, most: int) -> None:
        """Let every form judge its claims; no node may claim more than `most` elements."""
        for node in self.nodes.values():
            shape = torch.Size(node.slot.shape)
            if node.slot.numel > most:
                raise FileError(f"a tensor {list(shape)} is implausibly large for this file")
            slots = {k: self.slot(p) for k, p in node.parts.items()}
            try:
                node.form.check({k: (torch.Size(s.shape), s.dtype) for k, s in slots.items()}, shape, node.slot.dtype)
            except FileError:
                raise
            except Exception as error:
                raise FileError(f"form {node.form.name!r}: {type(error).__name__}: {first_line(error)}") from error


def pairs(pieces: Any) -> dict[str, Any]:
    """Of [name, part, name, part, ...]; raises FileError for a name that is no text or stands twice."""
    if not isinstance(pieces, list) or len(pieces) % 2:
        raise FileError(f"{brief(pieces)} is no list of names and parts")
    found: dict[str, Any] = {}
    for name, part in zip(pieces[::2], pieces[1::2], strict=True):
        if not isinstance(name, str) or name in found:
            raise FileError(f"{brief(name)} is no name or stands twice")
        found[name] = part
    return found


def _form(name: str, settings: dict[str, Any]) -> Form:
    key, _, version = name.partition("@")
    try:
        form = build(shelf.load("forms", key, Form), settings, f"form {key!r}")
        check(form, f"form {key!r}")
    except RecipeError as error:
        raise FileError(str(error)) from None
    except Exception as error:
        raise FileError(f"form {brief(key)} cannot be had: {type(error).__name__}: {first_line(error)}") from error
    if ramps(form):
        raise FileError(f"form {key!r}: a setting that moves")
    if (version or "1") != str(form.version):
        raise FileError(f"form {key!r} is of version {brief(version or '1')}, this smelt has version {form.version}")
    return form  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Resting:
    """An activation with the numbers of its leaves (None: absent) in place of its state."""

    path: str
    at: str
    codec: str
    settings: dict[str, Any]
    state: dict[str, int | None]
    learn: list[str]

    @staticmethod
    def read(data: Any, reader: Reader) -> Resting:
        """The inverse of `Writer.activation`.  Raises FileError."""
        if not isinstance(data, list) or [type(x) for x in data] != [str, str, str, dict, list, list]:
            raise FileError(f"{brief(data)} is no activation")
        path, at, codec, settings, pieces, learn = data
        state: dict[str, int | None] = {}
        for key, piece in pairs(pieces).items():
            leaf = None if piece is False else reader.part(piece)
            if isinstance(leaf, Node):
                raise FileError(f"{brief(piece)} is no tensor of a state")
            state[key] = leaf
        if not all(isinstance(key, str) for key in learn):
            raise FileError(f"{brief(learn)} names no tensors")
        return Resting(path, at, codec, settings, state, learn)

    def awake(self, leaf: Callable[[int], Tensor]) -> Activation:
        """Raises FileError or RecipeError: no such codec, or not at this place."""
        codec = make(self.codec, self.settings)
        if not isinstance(codec, Codec) or codec.lossless or self.at not in codec.places or self.at == "weight":
            raise FileError(f"{self.codec!r} does not act at {brief(self.at)}")
        if ramps(codec):
            raise FileError(f"{self.codec!r}: a setting that moves")
        tensors = {k: None if i is None else leaf(i) for k, i in self.state.items()}
        return Activation(self.path, self.at, codec, State(learn=self.learn, **tensors))


def brief(data: Any) -> str:
    """What a file says, short and on one line."""
    return reprlib.repr(data)[:80]
