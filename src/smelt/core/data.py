"""Data as everything else sees it: splits that are iterated, batches that are normalised.

Batches      tensors in memory, in an order that repeats exactly
Data         train, valid and test: any iterables of batches (a DataLoader, a list, Batches)
Guided       a batch that carries the teacher's outputs, recorded beforehand
batch        what a loader yields -> (inputs, labels); forward and logits_of take them on
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from smelt.core.errors import DataError, ModelError, SmeltError
from smelt.core.named import first_line

SPLITS = ("train", "valid", "test")
LABELS = ("labels", "label", "target")

Transform = Callable[[Tensor, Generator], Tensor]


class Guided(NamedTuple):
    """A batch with the teacher's logits for it: distillation then runs no teacher."""

    inputs: Any
    labels: Any
    teacher: Tensor


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
        self.inputs, self.labels, self.transform = inputs, labels, transform
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.epoch = 0
        self._fingerprint: str | None = None

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
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.labels):
            digest.update(describe(tensor).encode())
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digest.update(repr((self.batch_size, self.shuffle, self.seed, identity(self.transform))).encode())
        self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _generator(seed: int, epoch: int, purpose: str) -> Generator:
    """Streams that do not meet: (seed 0, epoch 1) is not (seed 1, epoch 0)."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def identity(function: Any) -> str:
    """Equal for equal functions; what shows an address instead of its content never equals anything."""
    text = repr(function)
    if (code := getattr(function, "__code__", None)) is not None:
        cells = [c.cell_contents for c in function.__closure__ or ()]
        bound = getattr(function, "__self__", None)
        known = function.__module__, function.__qualname__, code.co_code, code.co_consts, code.co_names
        text = repr((*known, function.__defaults__, function.__kwdefaults__, cells, bound))
    return f"{text}{token_hex()}" if " at 0x" in text else text


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
    classes: their names in the order of the labels, where they have names.
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
    known = {name: loader for name, loader in sorted(splits.items()) if loader is not None}
    marks = [f"{name}={loader.fingerprint()}" for name, loader in known.items() if isinstance(loader, Batches)]
    return hashlib.sha256(";".join(marks).encode()).hexdigest() if len(marks) == len(known) else None


def check_data(data: Any) -> None:
    """Raise DataError for what is neither `Data` nor None."""
    if data is not None and not isinstance(data, Data):
        raise DataError(f"data is a {type(data).__name__}; wrap your loaders: smelt.Data(train=..., test=...)")


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
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not hasattr(loader, "__iter__"):
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
    if isinstance(item, Guided):
        return item.inputs, item.labels
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
    elif isinstance(tree, (Mapping, tuple, list)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(value)


def samples(inputs: Any) -> int:
    """Samples in a batch: rows of its first tensor (1 if that has no dimension).

    Raises:
        DataError: no tensor in it.
    """
    if (first := next(tensors(inputs), None)) is None:
        raise DataError(f"a batch of {type(inputs).__name__} holds no tensor; inputs are tensors, in tuples or dicts")
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


def forward(model: Callable[..., Any], inputs: Any) -> Any:
    """model(x), model(*x) for a tuple or list, model(**x) for a mapping."""
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def forward_or_raise(model: Callable[..., Any], inputs: Any, where: str) -> Any:
    """`forward`, with ModelError in one line for whatever goes wrong: 'the model fails {where}, given ...'."""
    try:
        return forward(model, inputs)
    except SmeltError:
        raise
    except Exception as error:
        raise ModelError(f"the model fails {where}, given {describe(inputs)}: {first_line(error)}") from error


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
