"""`.smelt`: the trees of a compressed model, its edits, and how to build it, in one small file.

    save(model, "net.smelt")
    model = load("net.smelt")
    with File("net.smelt") as file:
        file.encoded("fc1.weight")

No code is in a file and none of it is run: a module comes from a builder on the shelf `models/`, from the caller
(`into`), or, only with `trust=True`, from a function that the file names.  docs/format.md has every byte.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.edit import Edit, apply_all, put
from smelt.core.encoded import Encoded
from smelt.core.errors import FileError, ModelError
from smelt.core.method import Lossless, State, make
from smelt.core.named import check_arguments, function_at
from smelt.core.output import check_output
from smelt.core.source import Source
from smelt.core.store import Entry, Store, check_fresh, pack, store_of
from smelt.core.target import Target, targets
from smelt.formats._container import check_holds, to_bytes, write
from smelt.formats._file import File
from smelt.formats._meta import Writer, brief

DEFAULT_TAIL = ("code.bits", "code.entropy")


@torch.no_grad()
def save(
    model: nn.Module,
    path: str | Path,
    *,
    recipe: Any = None,
    report: Any = None,
    tail: Sequence[Lossless] | None = None,
    force: bool = False,
) -> int:
    """Write a model, complete or not at all; returns the bytes of the file.

    Args:
        recipe, report: plain data to keep in the file.
        tail: lossless codecs for every leaf, () for none; by default those the model's store names for a tensor,
            and `code.bits` and `code.entropy`.
        force: replace an existing file.

    Raises:
        OutputError: the file exists, no space, not writable.
        ModelError: a stored tensor was changed behind the store, or something that no file can hold.
    """
    check_fresh(model)
    path = Path(path)
    check_output(path, force)
    held = store_of(model)
    packer = _Packer(held, tail)
    writer = Writer()
    pieces = [x for t in targets(model) for x in (t.name, writer.part(packer.pack(t)))]
    source = held.source or Source()
    meta = {
        "builder": source.builder,
        "arguments": dict(source.arguments),
        "edits": [edit.to_plain() for edit in held.edits],
        "tensors": pieces,
        "activations": [writer.activation(one) for one in held.activations],
        "recipe": recipe,
        "report": report,
    }
    meta = {k: v for k, v in meta.items() if v not in (None, [], {})}
    return write(path, meta, writer.leaves, sealed=writer.sealed, force=force)


def save_again(old: str | Path, path: str | Path, **changes: Any) -> int:
    """Write a file once more, its leaves as they lie there; returns the bytes.

    Args:
        changes: what stands in place of what its meta has under these keys: recipe, report.

    Raises:
        FileError: no such file, or a damaged one.
        OutputError: `path` exists, no space, not writable.
    """
    with File(old) as file:
        leaves = [file.leaf(i) for i in range(len(file._reader.slots))]
        return write(Path(path), {**file._meta, **changes}, leaves, sealed=file._reader.sealed)


def coders(named: tuple[Lossless, ...]) -> tuple[Lossless, ...]:
    """The lossless codecs with which a leaf is written, if these are named for it."""
    floor = [make(name) for name in DEFAULT_TAIL]
    return (*named, *(codec for codec in floor if codec not in named))


class _Packer:
    """Packs tensors so that leaves shared between them stay shared."""

    def __init__(self, held: Store, tail: Sequence[Lossless] | None):
        self.held = held
        self.tail = tail
        self.home: dict[int, tuple[Tensor, Tensor]] = {}
        self.coders: dict[str, _Once] = {}
        self.trees = {n: e.encoded.map(lambda _, leaf: self._at_home(leaf)) for n, e in held.entries.items()}
        seen = Counter(id(leaf) for tree in self.trees.values() for _, leaf in tree.leaves())
        self.shared = {i for i, count in seen.items() if count > 1}

    def pack(self, target: Target) -> Tensor | Encoded:
        check_holds(target.tensor, str(target))
        tail = self.tail
        if tail is None:
            tail = coders(self.held.tails.get(target.name, ()))
        once = [self.coders.setdefault(repr(c), _Once(c, self.shared)) for c in tail]
        part = self.trees.get(target.name)
        return pack(target.tensor.detach().cpu() if part is None else part, once)  # type: ignore[arg-type]

    def _at_home(self, leaf: Tensor) -> Tensor:
        return self.home.setdefault(id(leaf), (leaf, leaf.detach().cpu()))[1]


class _Once:
    """A lossless codec that codes a shared leaf once."""

    def __init__(self, codec: Lossless, shared: set[int]):
        self.codec = codec
        self.shared = shared
        self.done: dict[int, Encoded] = {}

    def encode(self, x: Tensor, state: State) -> Encoded:
        if id(x) not in self.shared:
            return self.codec.encode(x, state)
        if id(x) not in self.done:
            self.done[id(x)] = self.codec.encode(x, state)
        return self.done[id(x)]


def load(path: str | Path, into: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
    """The model of a file, in eval mode, with its store.

    Without `into`, tensors get the floating dtype they have in the file.  All names, shapes and dtypes are
    compared before anything is decoded.

    Args:
        into: the module as it was before it was compressed, freshly built; it is edited and filled in place.  For a
            packed checkpoint any module with tensors of these names, which may leave out places of tied ones.
        trust: let the file name any function of an importable module as its builder.  That runs code!

    Raises:
        FileError: a damaged, foreign or newer file, one that does not fit the model, or a builder that is not ours.
        ModelError: `into` is compressed already.
    """
    with (
        File(path, own=True, threads=torch.get_num_threads()) as file,
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        loader = _Loader(file)
        model = loader.given(into) if into is not None else loader.built(trust)
        _fill(file, model, loader)
    return model.eval()


class _Loader:
    """Makes a module that fits the file: built, edited, compared, still without the file's tensors."""

    def __init__(self, file: File):
        self.file = file
        self.edits: list[Edit] = []

    def given(self, model: nn.Module) -> nn.Module:
        held = vars(model).get("_smelt", Store())
        if held.entries or held.edits or held.activations:
            raise ModelError("the module given as into= is compressed already; pass it freshly built")
        if (ghost := _ghost(model)) is not None:
            with torch.device("meta"):
                self.edit(ghost)
            self.compare(ghost, strict=True)
        self.edit(model)
        self.compare(model, strict=True)
        if _strays(model):
            raise ModelError("the module given as into= has tensors on the meta device that no file holds")
        return model

    def built(self, trust: bool) -> nn.Module:
        name = self.file.builder
        if self.file.packed:
            raise self.file.error(
                "it is a packed checkpoint and names no model; pass into=<the module>, call smelt.load_file for its "
                "tensors, or smelt.unpack (smelt unpack) for the .safetensors file"
            )
        if name is None:
            raise self.file.error("it names no builder; pass into=<the module before it was compressed>")
        if name in shelf.names("models"):
            with self.file.blame(f"builder {name!r}"):
                build = shelf.module("models", name).build
        elif trust:
            with self.file.blame(f"builder {name!r}"):
                build = function_at(name, FileError)
            return self.compare(self.edit(self.call(build)))
        else:
            raise self.file.error(
                f"it is built by {brief(name)}, which is not part of smelt; "
                "pass into=<the module before it was compressed>, or trust=True to run that code"
            )
        with torch.device("meta"):
            model = self.compare(self.edit(self.call(build)))
        strays = _strays(model)
        if sum(stray.numel() for stray in strays) > self.file.most:
            raise self.file.error(f"builder {name!r} makes implausibly large buffers of {self.file.arguments}")
        return self.compare(self.edit(self.call(build))) if strays else model

    def call(self, build: Callable[..., Any]) -> nn.Module:
        name, arguments = self.file.builder, self.file.arguments
        with self.file.blame(f"builder {name!r}"):
            check_arguments(build, arguments, str(name), FileError)
            model = build(**arguments)
            if not isinstance(model, nn.Module):
                raise FileError(f"it returns a {type(model).__name__}, no module")
        return model

    def edit(self, model: nn.Module) -> nn.Module:
        """Replay the edits; they may keep as many positions as 64 cuts of every dimension would."""
        most = 64 * sum(sum(t.tensor.shape) for t in targets(model)) + (1 << 16)
        self.edits = self.edits or self.file.read_edits(most)
        with self.file.blame("its edits do not fit the model"):
            apply_all(model, self.edits)
            for one in self.file.activations:
                model.get_submodule(one.path)
        return model

    def compare(self, model: nn.Module, *, strict: bool = False) -> nn.Module:
        """Raise FileError unless the tensors of model and file have the same names and shapes, and like dtypes."""
        own = {name: t.tensor for t in targets(model) for name in self.names(t)}
        names = dict.fromkeys(self.file.names())
        kinds = {"lacks": [n for n in own if n not in names], "alone has": [n for n in names if n not in own]}
        if found := [f"it {verb} {_brief(some)}" for verb, some in kinds.items() if some]:
            raise self.file.error(f"it does not fit the model: {' and '.join(found)}")
        for name, tensor in own.items():
            shape, dtype = self.file.shape(name), self.file.dtype(name)
            like = not strict and dtype.is_floating_point and tensor.is_floating_point()
            if shape != tensor.shape or not (dtype == tensor.dtype or like):
                raise self.file.error(
                    f"it does not fit the model: {name} is {list(shape)} {dtype} in the file "
                    f"and {list(tensor.shape)} {tensor.dtype} in the model"
                )
        return model

    def names(self, target: Target) -> list[str]:
        """What a target is called in the file; only a checkpoint may have a tied tensor under any of its names."""
        if not self.file.packed:
            return [target.name]
        places = [f"{path}.{name}" if path else name for path, name in target.places]
        known = set(self.file.names())
        return [name for name in places if name in known] or [target.name]


def _brief(names: Sequence[str]) -> str:
    return f"{len(names)} tensor(s) ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _fill(file: File, model: nn.Module, loader: _Loader) -> None:
    held = store_of(model)
    device = torch.device("cpu")
    for target in targets(model):
        name, *others = loader.names(target)
        own = target.tensor
        here = own.dtype == file.dtype(name) and own.device.type == "cpu" and own.is_contiguous()
        tree: Tensor | Encoded
        if file.straight(name):
            tree = dense = own if here else torch.empty(file.shape(name), dtype=file.dtype(name))
            file.read_into(name, dense)
        else:
            tree = file.dense_rows(name) if file.packed else file.encoded(name)
            dense = file.dense(name, tree).clone(memory_format=torch.contiguous_format)
        for other in others:
            if to_bytes(file.dense_rows(other)) != to_bytes(dense):
                raise file.error(
                    f"it does not fit the model: {name} and {other} are tied there, and differ in the file"
                )
        if isinstance(tree, Encoded):
            held.entries[target.name] = Entry(tree, (file.path.name,))
        if coders := _coders(file.forms(name)):
            held.tails[target.name] = coders
        if own.is_meta or own.dtype != dense.dtype:
            put(model, target, dense.to(_real(own.device)))
        else:
            own.copy_(dense)
            device = own.device
    held.edits = list(loader.edits)
    held.source = Source(builder=file.builder, arguments=file.arguments)
    for one in file.activations:
        with file.blame(f"activation of {one.path!r}"):
            activation = one.awake(file.leaf)
            activation.state.to(device)
            activation.install(model)
        held.activations.append(activation)


def _coders(forms: Sequence[str]) -> tuple[Lossless, ...]:
    """The lossless codecs with which a tensor was written, so that it is written so again."""
    known = shelf.names("methods")
    return tuple(make(name) for name in dict.fromkeys(f"code.{form}" for form in forms) if name in known)


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _ghost(model: nn.Module) -> nn.Module | None:
    """The same module on the meta device, or None where it cannot be copied."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # a module may hold anything
        return None


def _strays(model: nn.Module) -> list[Tensor]:
    """Tensors on the meta device that no file holds: buffers that are not persistent, plain attributes."""
    held = {id(t.tensor) for t in targets(model)}
    found = {id(t): t for module in model.modules() for t in _tensors(vars(module).values()) if t.is_meta}
    return [tensor for i, tensor in found.items() if i not in held]


def _tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, (dict, list, tuple)):
            yield from _tensors(thing.values() if isinstance(thing, dict) else thing)


def show(path: str | Path) -> dict[str, Any]:
    """What is in a file, as plain data.  Leaves that are coded without loss are decoded for it, but for a packed one.

    Raises:
        FileError: no file, a foreign, damaged or newer one.
    """
    with File(path) as file:
        origin = file.origin if file.packed else None
        tensors = []
        for name in file.names():
            awake = None if file.packed else file.encoded(name)
            count, size = file.numel(name), file.rest_bytes(name)
            tensors.append(
                {
                    "name": name,
                    "shape": list(file.shape(name)),
                    "dtype": str(file.dtype(name)).removeprefix("torch."),
                    "tree": str(awake) if isinstance(awake, Encoded) else "dense",
                    "rest": file.stored(name),
                    "bytes": size,
                    "bits": 8 * size / count if count else 0.0,
                }
            )
        return {
            "file": str(file.path),
            "version": file.version,
            "bytes": file.nbytes,
            "leaf bytes": file.leaf_bytes,
            "meta bytes": file.nbytes - file.leaf_bytes,
            "builder": file.builder,
            "arguments": file.arguments,
            "edits": [edit.to_plain() for edit in file.edits],
            "activations": [[one.path, one.at, one.codec] for one in file.activations],
            "tensors": tensors,
            "origin": None if origin is None else {"header bytes": len(origin.header.raw), **origin.to_plain()},
            "recipe": file.recipe,
            "report": file.report,
        }
