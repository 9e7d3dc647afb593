"""The three kinds of act.  A method is one file in `methods/`, named by its path.

Codec      stores a tensor in another form
Rewrite    changes the model's structure, as a list of edits
Objective  adds a term to the training loss
Composite  stands for several steps of these kinds
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.data import batch, move
from smelt.core.encoded import Encoded
from smelt.core.errors import DataError, RecipeError
from smelt.core.settings import build, check

if TYPE_CHECKING:
    from smelt.core.edit import Edit
    from smelt.core.target import Target

CARD_LINES = (
    "applies to",
    "needs a pretrained model",
    "needs data",
    "needs training",
    "good at",
    "bad at",
    "source",
)


class State(nn.Module):
    """What a method learnt or remembers about one tensor: scales, masks, codebooks, a projector.

    >>> s = State(scale=torch.ones(3), learn=("scale",))
    """

    def __init__(self, *, learn: Sequence[str] = (), **tensors: Tensor | None):
        super().__init__()
        for name, tensor in tensors.items():
            if name in learn and tensor is not None:
                self.register_parameter(name, nn.Parameter(tensor.detach().clone()))
            else:
                self.register_buffer(name, tensor)


@dataclass(frozen=True)
class Values:
    """A tensor as a codec sees it.

    x: the values, in the layout of the original tensor.
    where: bool mask in the same layout of the elements that count (earlier pruning), or None for all.
    """

    x: Tensor
    where: Tensor | None = None

    def kept(self) -> Tensor:
        """The elements that count, flat."""
        return self.x.reshape(-1) if self.where is None else self.x[self.where]


@dataclass(frozen=True)
class Inside:
    """What a codec may know of the loop that it acts in.

    progress: share of the loop that is done, 0..1.
    before: the state that the codec gave last; None at the first fit.
    seen: what was accumulated since training began, for those the codec asked for (`needs_at("training")`); empty at
        the first fit.
    """

    progress: float = 0.0
    before: State | None = None
    seen: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """What `fit` may know besides the tensor.

    where: as in `Values`.
    gathered: one entry per statistic that the codec asked for (`needs_at`), by name.
    seed: for whatever is drawn at random; differs between tensors, repeats between runs.
    inside: what only a training loop knows, or None outside of one.
    """

    where: Tensor | None = None
    gathered: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    inside: Inside | None = None


@dataclass(frozen=True)
class Known:
    """What a step may know besides the model itself.

    batches: calibration batches as a loader yields them, or None.
    loss: (outputs, labels) -> scalar, of the task; for scores that need gradients.
    prices: 'parameters', 'macs', 'bytes' (of the file), 'milliseconds' -> a function that takes a model and measures
        it; empty where nobody measures (inside `train`).
    gathered: module path -> (place, statistic) -> what was found, for those in a rewrite's `needs`.
    original: gives the model as it was before anything of it was stored, a copy of the caller's own.
    """

    batches: Iterable[Any] | None = None
    loss: Callable[[Tensor, Any], Tensor] | None = None
    prices: Mapping[str, Callable[[nn.Module], float]] = field(default_factory=dict)
    gathered: Mapping[str, Mapping[tuple[str, str], Any]] = field(default_factory=dict)
    seed: int = 0
    original: Callable[[], nn.Module] | None = None

    def example(self, model: nn.Module, why: str) -> Any:
        """Inputs of the first batch, on the model's device.  Raises DataError: there are no batches; `why` they are
        needed completes 'it needs data ...'."""
        for item in self.batches or ():
            device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
            return move(batch(item)[0], device)
        raise DataError(f"it needs data {why}; give the job data")


class Method:
    """Base of the acts: a frozen dataclass whose fields are the settings, each with a default.

    The class docstring ends with the fixed lines of `CARD_LINES` ("applies to: ...", one line each).
    """

    @property
    def name(self) -> str:
        """'share.kmeans' for smelt/methods/share/kmeans.py; the module's own name elsewhere."""
        return _name_of(type(self))

    def __post_init__(self) -> None:
        check(self, self.name)

    @classmethod
    def card(cls) -> dict[str, str]:
        """{'does': first line of the docstring, 'applies to': ..., ...} for `smelt methods`."""
        lines = [line.strip() for line in (cls.__doc__ or "").strip().splitlines()]
        found = {"does": lines[0] if lines else ""}
        for key in CARD_LINES:
            found[key] = next((line[len(key) + 1 :].strip() for line in lines if line.startswith(key + ":")), "")
        return found


def _name_of(cls: type) -> str:
    path = cls.__module__
    if path.startswith("smelt.methods."):
        return path[len("smelt.methods.") :]
    known = {v: k for k, v in shelf._modules("methods").items()}
    return known.get(path, path)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` exactly, with the gradient of `x` (Bengio et al. 2013, arXiv:1308.3432)."""
    return _StraightThrough.apply(x, value)  # type: ignore[no-any-return]


class Codec(Method, ABC):
    """Stores a tensor in another form.  Write `fit` and `encode`; the rest has defaults.

    `lossless`: codes leaves without loss, at rest in the file only (see `pack`).
    `settles`: inside `train`, the state is frozen for the last part of the loop (a mask must stop
        moving); otherwise it is fitted anew every epoch until the end.
    `renews`: inside `train`, a state that learns is fitted anew, too; `fit` then changes `stats.inside.before` and
        returns it, so that its parameters stay the same ones.
    `places`: which of 'weight', 'input', 'output', 'saved' the codec serves; at saved it gets flat values, and is
        asked to `fit` them with nothing gathered.
    """

    lossless: ClassVar[bool] = False
    settles: ClassVar[bool] = False
    renews: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ("weight",)

    def refuses(self, target: Target) -> str | None:
        """Why this target cannot be stored so, or None.  Refused targets are named in the report."""
        return None

    def needs_at(self, place: str) -> tuple[str, ...]:
        """Names on the shelf `statistics/` that `fit` reads from `stats.gathered` when it acts at `place`.

        For 'weight' statistics of values are gathered at the input of its module, those of gradients at the weight.
        Two more places:
        'plan': what `plan` reads from `scout` of a codec that goes in order (others have there what `fit` reads), and
            `fit` too, of the model before this step, unless it asks for the same again.
        'training': what `fit` reads from `stats.inside.seen`, both of the shape of what the codec eats: 'movement',
            the sum over backward passes of -x dL/dy, and 'slope', the last dL/dy, where y is what the codec gives
            for x, so that the gradient counts for masked entries too.
        """
        return ()

    def order(self) -> str | None:
        """How what `fit` needs is gathered: None, of all tensors at once; or in the order in which the model runs, of
        one 'block', or of one 'layer' (and those that share its input), after all before it have been stored."""
        return None

    def period(self) -> int | None:
        """Inside train, optimizer steps between two fits of what moves; None: as `train` says (`refresh`)."""
        return None

    def restarts(self, before: State | None, now: State) -> Tensor | None:
        """Inside train, after a fit: mask of the entries whose values start anew from 0, and the optimizer's moments
        with them; None for none."""
        return None

    def plan(
        self, tensors: Mapping[str, Values], scout: Mapping[str, Any], cost: Callable[[Encoded], int]
    ) -> dict[str, Codec]:
        """Which codec for which tensor; global thresholds and budgets are decided here.

        Args:
            tensors: name -> what the codec would eat.
            scout: statistics of the model before this step: name of the tensor -> statistic -> result.
            cost: bytes in the file of a candidate, with the recipe's lossless tail applied.
        """
        return dict.fromkeys(tensors, self)

    @abstractmethod
    def fit(self, x: Tensor, stats: Stats) -> State:
        """Scale, codebook, mask: everything that must be known to encode `x`."""

    @abstractmethod
    def encode(self, x: Tensor, state: State) -> Encoded:
        """`x` in the new form.  Leaves are new tensors; `x` is not changed."""

    def simulate(self, x: Tensor, state: State) -> Tensor:
        """`x` after a round trip, differentiable: by default straight-through (gradient of x)."""
        return straight_through(x, self.encode(x.detach(), state).decode())


class Lossless(Codec):
    """A codec for one leaf at rest: `encode` must be undone exactly by the form's `decode`.

    It declines (is not used for a leaf) where it would not shrink it; of several, the smallest wins.
    """

    lossless = True

    def fit(self, x: Tensor, stats: Stats) -> State:
        return State()


class Rewrite(Method, ABC):
    """Changes the model's structure.  The core applies and records the edits."""

    needs: ClassVar[tuple[str, ...]] = ()

    def refuses(self, target: Target) -> str | None:
        """Why this target cannot be changed so, or None.  What only the whole model tells, `plan` says in a `Note`."""
        return None

    @abstractmethod
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        """The edits, as plain data.

        Args:
            model: to look at; it must not be changed here.
            targets: the tensors selected by the step (its `on`).
            known: data, the task's loss, prices; and what was gathered for `needs`.
        """


@dataclass(frozen=True)
class Weight(Values):
    """A tensor as the model used it in its last forward: a gradient at `x` reaches whatever learns it.

    module: where it stands (the first of its places).
    """

    module: nn.Module | None = None


@dataclass(frozen=True)
class Look:
    """What an objective looks at besides the outputs, and what it holds.

    features, teacher_features: paths of the modules of the model and of the teacher whose outputs it wants to see.
    state: what it learns or remembers, a projector; it trains with the model and lies in the checkpoints of the loop,
        never in the model's file.
    """

    features: tuple[str, ...] = ()
    teacher_features: tuple[str, ...] = ()
    state: State | None = None


@dataclass(frozen=True)
class Seen:
    """What one training step has seen; handed to every objective.

    outputs, teacher: outputs of the model and of the teacher (None without one), after `logits_of`.
    labels: the batch's labels, or None.
    hard: the task's loss on the labels (a scalar), or None when there are none.
    weights: name -> what the objective's selector names, if it `needs_weights`.
    features, teacher_features: module path -> what that module gave, for those the objective asked for.
    look: what its `look` gave.
    counts: bool mask in the layout of the outputs, without their last dimension, of those that count in a batch that
        `prepare` made; else None.
    """

    inputs: Any
    outputs: Tensor
    labels: Any = None
    teacher: Tensor | None = None
    hard: Tensor | None = None
    weights: Mapping[str, Weight] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)
    teacher_features: Mapping[str, Any] = field(default_factory=dict)
    look: Look = field(default_factory=Look)
    counts: Tensor | None = None


class Objective(Method, ABC):
    """Adds a term to the training loss.

    `needs_weights`: it looks at tensors of the model: those that the step selects (`on`) and it does not refuse.
    `all_kinds`: a bare '*' in that selector means every tensor that it does not refuse, not only weights.
    """

    needs_teacher: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    all_kinds: ClassVar[bool] = False

    def refuses(self, target: Target) -> str | None:
        """Why it does not look at this target, or None."""
        return None

    def look(self, model: nn.Module, teacher: Any, known: Known) -> Look:
        """Asked once, before training begins."""
        return Look()

    def prepare(
        self, model: nn.Module, inputs: Any, labels: Any, generator: torch.Generator
    ) -> tuple[Any, Tensor] | None:
        """What the model and the teacher are run on instead of a batch, and which outputs `counts`; None to leave it.

        Args:
            generator: for what is drawn, on the CPU; another one for every batch.
        """
        return None

    def hard_weight(self) -> float:
        """Factor of the task's own loss while this objective acts (distillation: alpha)."""
        return 1.0

    @abstractmethod
    def loss(self, seen: Seen) -> Tensor:
        """The term, a scalar."""


class Composite(Method, ABC):
    """Stands for several steps: the recipe holds these in its place, so that each has its row in the report."""

    @abstractmethod
    def steps(self) -> list[Any]:
        """The steps, as in a recipe: methods, `Step`s, or plain data such as {"quantize.affine": {"bits": 4}}.

        The composite's own `on` and `at` hold for each of them that does not say otherwise.
        """


def make(name: str, settings: Mapping[str, Any] | None = None, where: str = "") -> Any:
    """A method by its name and plain settings: make('share.kmeans', {'clusters': 16}).

    Raises:
        RecipeError: unknown name or setting (with the nearest one), wrong type, out of range.
    """
    cls = shelf.load("methods", name, Method)
    if settings is not None and not isinstance(settings, Mapping):
        raise RecipeError(f"{where or name}: settings are a mapping such as {{ratio: 0.5}}, not {settings!r}")
    try:
        return build(cls, settings or {}, name)
    except RecipeError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from None
