"""Data as everything else sees it: splits that are iterated, batches that are normalised.

    Batches      tensors in memory, in an order that repeats exactly
    Data         train, valid and test: any iterables of batches (a DataLoader, a list, Batches)
    batch        what a loader yields -> (inputs, labels)
    forward      model, inputs -> output
    logits_of    output -> tensor

and how text names a builder or a loader: `function_at("module:function")`, `parse_call("lenet(hidden=100)")`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from smelt.core.errors import DataError, ModelError, SmeltError, nearest

SPLITS = ("train", "valid", "test")
LABELS = ("labels", "label", "target")

Transform = Callable[[Tensor, Generator], Tensor]


class Batches:
    """Batches of tensors in memory; what is drawn depends on (seed, epoch) alone.

    Args:
        inputs: [n, ...].
        labels: [n, ...], or None.
        shuffle: another permutation every epoch.
        transform: `transform(x, generator)` of a batch of inputs, e.g. augmentation; it draws from the
            generator only.

    Raises:
        DataError: inputs that are no tensor, a number of labels that differs, a batch size below 1.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        transform: Transform | None = None,
    ):
        for name, tensor in (("inputs", inputs), ("labels", labels)):
            if not isinstance(tensor, Tensor) and not (name == "labels" and tensor is None):
                raise DataError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if inputs.dim() == 0 or (labels is not None and (labels.dim() == 0 or len(labels) != len(inputs))):
            found = "no labels" if labels is None else f"labels {list(labels.shape)}"
            raise DataError(f"inputs {list(inputs.shape)} and {found}: both need one row per sample")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise DataError(f"batch_size is {batch_size!r}; it takes a whole number from 1")
        self.inputs = inputs
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.transform = transform
        self.epoch = 0

    @property
    def samples(self) -> int:
        return len(self.inputs)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        order = torch.arange(self.samples)
        if self.shuffle:
            order = torch.randperm(self.samples, generator=_generator(self.seed, self.epoch, "order"))
        generator = _generator(self.seed, self.epoch, "transform")
        for chosen in torch.split(order, self.batch_size) if self.samples else ():
            x = self.inputs[chosen]
            if self.transform is not None:
                x = self.transform(x, generator)
            yield x, None if self.labels is None else self.labels[chosen]

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation and the random numbers of the next iteration, as torch's DistributedSampler does."""
        self.epoch = epoch

    def split(self, fraction: float, seed: int = 0) -> tuple[Batches, Batches]:
        """(rest, held out): `fraction` of the samples is held out, unshuffled and without the transform.

        Stratified where the labels are whole numbers, one per sample: each class gives its share, give or take one.

        Raises:
            DataError: a fraction outside 0..1, or one that leaves either side empty.
        """
        rest, held = parts(self.samples, self.labels, fraction, seed)

        def take(chosen: Tensor, **settings: Any) -> Batches:
            labels = None if self.labels is None else self.labels[chosen]
            return Batches(self.inputs[chosen], labels, self.batch_size, seed=self.seed, **settings)

        return take(rest, shuffle=self.shuffle, transform=self.transform), take(held)

    def fingerprint(self) -> str:
        """sha256 of the tensors and the settings, computed once: do not change the tensors afterwards.

        A transform counts by its name, code and what it closes over, not by the globals it reads.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.labels):
            if tensor is None:
                digest.update(b"none")
                continue
            digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digest.update(repr((self.batch_size, self.shuffle, self.seed, _identity(self.transform))).encode())
        return digest.hexdigest()


def _generator(seed: int, epoch: int, purpose: str) -> Generator:
    """Streams that do not meet: (seed 0, epoch 1) is not (seed 1, epoch 0)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _identity(function: Any) -> tuple[str, ...]:
    """Equal for equal functions; what has no stable text (an object at an address) never repeats, which is safe."""
    if function is None:
        return ()
    code = getattr(function, "__code__", None)
    if code is None:
        return (repr(function),)
    cells = [c.cell_contents for c in function.__closure__ or ()]
    bound = getattr(function, "__self__", None)
    names = f"{function.__module__}.{function.__qualname__}", code.co_code.hex()
    return *names, repr((code.co_consts, code.co_names, function.__defaults__, function.__kwdefaults__, cells, bound))


def parts(n: int, labels: Tensor | None, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (rest, held out) of a seeded split of n samples, each ascending.

    round(n * fraction) samples are held out, halves up.  One-dimensional whole-number labels are stratified:
    samples are drawn in random order, sorted by class, and picked at even distances.

    Raises:
        DataError: a fraction outside 0..1, or one that leaves either side empty.
    """
    held = int(n * fraction + 0.5) if 0 < fraction < 1 else 0
    if not 0 < held < n:
        raise DataError(f"cannot hold out {fraction} of {n} samples; both parts need at least one")
    order = torch.randperm(n, generator=_generator(seed, 0, "split"))
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        order = order[labels.cpu()[order].argsort(stable=True)]
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[(2 * torch.arange(held) + 1) * n // (2 * held)]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


@dataclass
class Data:
    """The splits of a data set: iterables of batches that can be iterated again, or None.

    fingerprint: changes when anything that a run depends on changes; None = cannot be known, and nothing
        computed from this data is cached.
    classes: names of the classes, in the order of the labels, where they have names.
    """

    train: Iterable[Any] | None = None
    valid: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    name: str = "data"
    fingerprint: str | None = None
    classes: tuple[str, ...] = ()

    def splits(self) -> dict[str, Iterable[Any]]:
        """Those that exist, by name."""
        return {name: loader for name in SPLITS if (loader := getattr(self, name)) is not None}


def fingerprint(splits: Mapping[str, Iterable[Any] | None]) -> str | None:
    """sha256 over the splits of a data set, or None if one of them is not `Batches`."""
    digest = hashlib.sha256()
    for name, loader in sorted(splits.items()):
        if loader is None:
            continue
        if not isinstance(loader, Batches):
            return None
        digest.update(f"{name}={loader.fingerprint()};".encode())
    return digest.hexdigest()


def check(data: Data, *, labels: bool = False, needs: Sequence[str] = ()) -> None:
    """Look at the first batch of every split.

    Args:
        labels: every split must have labels (a metric or the task's loss needs them).
        needs: splits that must exist, of 'train', 'valid', 'test'.

    Raises:
        DataError: naming the split: missing, empty, without labels, or readable only once.
    """
    found = data.splits()
    for name in needs:
        if name not in found:
            there = f"it has {', '.join(found)}" if found else "it has no split at all"
            raise DataError(f"{data.name} has no {name!r} split, and one is needed; {there}")
    for name, loader in found.items():
        where = f"{data.name}, split {name!r}"
        check_loader(loader, where)
        first = next(iter(loader), None)
        if first is None:
            raise DataError(f"{where} is empty; it needs at least one batch")
        inputs, given = batch(first)
        if samples(inputs) == 0:
            raise DataError(f"{where}: the first batch is empty; it needs at least one sample")
        if labels and given is None:
            raise DataError(f"{where} has no labels, and the metric needs them; yield (inputs, labels)")


def check_loader(loader: Any, where: str) -> None:
    """Raise DataError for what is no iterable of batches, or one that can be read only once."""
    kind = type(loader).__name__
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not (
        isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    ):
        raise DataError(f"{where} is a {kind}; it must be an iterable of batches (a DataLoader)")
    if isinstance(loader, Iterator):
        raise DataError(f"{where} is a {kind}, which can be read only once; it must be a list or a DataLoader")


def batch(item: Any) -> tuple[Any, Any]:
    """(inputs, labels) of what a loader yields; labels are None where there are none.

    A pair (x, y) is itself; of a longer tuple or list the last is the labels and the rest, as a tuple, the inputs;
    of a mapping the labels are under 'labels', 'label' or 'target' and the rest, as a dict, the inputs; anything
    else is the inputs.

    Raises:
        DataError: an empty tuple, list or mapping.
    """
    if isinstance(item, Mapping):
        key = next((k for k in LABELS if k in item), None)
        inputs = {k: v for k, v in item.items() if k != key}
        if not inputs:
            raise DataError(f"a batch holds no inputs, only {sorted(map(str, item))}")
        return inputs, None if key is None else item[key]
    if isinstance(item, (tuple, list)):
        if not item:
            raise DataError("a batch is an empty tuple; it should be (inputs, labels)")
        if len(item) == 1:
            return item[0], None
        return (item[0] if len(item) == 2 else tuple(item[:-1])), item[-1]
    return item, None


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors(value)


def samples(inputs: Any) -> int:
    """Samples in a batch: rows of its first tensor (1 if that has no dimension).

    Raises:
        DataError: no tensor in it.
    """
    first = next(tensors(inputs), None)
    if first is None:
        raise DataError(
            f"a batch of {type(inputs).__name__} holds no tensor; inputs are tensors, or tuples or dicts of them"
        )
    return len(first) if first.dim() else 1


def move(tree: Any, device: str | torch.device) -> Any:
    """The same nesting with every tensor on `device`."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {k: move(v, device) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(move(v, device) for v in tree)
    return tree


def describe(inputs: Any) -> str:
    """'float32 [64, 1, 8, 8]', several separated by commas: for messages."""
    found = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors(inputs)]
    return ", ".join(found) or type(inputs).__name__


def forward(model: nn.Module, inputs: Any) -> Any:
    """model(x), model(*x) for a tuple or list, model(**x) for a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits_of(output: Any) -> Tensor:
    """The tensor that counts in a model's output: itself, `.logits`, ['logits'], or the first of a tuple or list.

    Raises:
        ModelError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    inner = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if inner is None and isinstance(output, (tuple, list)) and output:
        inner = output[0]
    if inner is None:
        raise ModelError(f"the model returns a {type(output).__name__}; it must be a tensor, a tuple or have 'logits'")
    return logits_of(inner)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; afterwards every submodule is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def parse_call(spec: str, error: type[SmeltError]) -> tuple[str, dict[str, Any]]:
    """'lenet(hidden=100)' -> ('lenet', {'hidden': 100}); a bare name has no arguments.

    Raises:
        error: arguments that are not keyword=literal.
    """
    if not spec.endswith(")"):
        return spec, {}
    name, _, rest = spec.partition("(")
    try:
        call = ast.parse(f"_({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        given = {str(k.arg or ""): ast.literal_eval(k.value) for k in call.keywords}
        if "" in given or len(given) < len(call.keywords):
            raise ValueError
        return name.strip(), given
    except (SyntaxError, ValueError):
        raise error(
            f"cannot read {spec!r}; arguments are keywords with plain values: name(hidden=100, size=8)"
        ) from None


def function_at(spec: str, error: type[SmeltError]) -> Callable[..., Any]:
    """The function that 'module:function' names; modules of the current directory come first.

    Raises:
        error: no such module or function (with the nearest), or a module that fails while it is imported.
    """
    path, _, name = spec.partition(":")
    if not path or not name.isidentifier() or not all(part.isidentifier() for part in path.split(".")):
        raise error(f"{spec!r} is not module:function")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(path)
    except Exception as problem:
        if isinstance(problem, ModuleNotFoundError) and (problem.name or "?") in (path, *_parents(path)):
            raise error(f"{spec!r}: no module {problem.name!r}, neither in {here} nor installed") from None
        raise error(
            f"{spec!r}: importing {path!r} failed: {type(problem).__name__}: {first_line(problem)}"
        ) from problem
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise error(f"{spec!r}: {path!r} has no function {name!r}{nearest(name, known)}")
    return function  # type: ignore[no-any-return]


def _parents(path: str) -> list[str]:
    return [path[:i] for i, c in enumerate(path) if c == "."]


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """What a function takes, by name; None = anything, or unknown (written in C)."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in known.values()) else known


def check_arguments(function: Callable[..., Any], given: Iterable[str], where: str, error: type[SmeltError]) -> None:
    """Raise `error` for an argument that a function does not take, with the nearest that it does."""
    known = parameters_of(function)
    if known is None:
        return
    for key in given:
        if key not in known or known[key].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise error(f"{where} has no argument {key!r}{nearest(key, known)}")
    missing = [
        k for k, p in known.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and k not in given
    ]
    if missing:
        raise error(f"{where} needs the argument {missing[0]!r}")
