"""The settings of a training loop: the steps `train` and `recover` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from smelt.core.errors import RecipeError
from smelt.core.settings import check, ramps, setting

OPTIMIZERS = ("adam", "adamw", "sgd", "sign")
SCHEDULES = ("cosine", "constant", "linear", "one-cycle")
# What means something only where the whole model learns.
ONE_MODEL = ("ema", "renorm", "mixup", "cutmix", "smoothing", "patience", "hard")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Train:
    """Tune the floating leaves of what is stored, and all that is not, with the pieces under `with` acting together."""

    name: ClassVar[str] = "train"
    pieces: ClassVar[tuple[Mapping[str, Any], ...]] = ()  # under `with`, where it says nothing

    epochs: int = setting(5, "passes over the training data", low=1)
    steps: int | None = setting(None, "optimizer steps after which it ends, if the epochs have not", low=1)
    lr: float = setting(1e-3, "peak learning rate", low=0)
    optimizer: str = setting("adam", "optimizer", choices=OPTIMIZERS)
    momentum: float = setting(0.9, "momentum (sgd, sign) or beta1 (adam)", low=0, high=1)
    weight_decay: float = setting(0.0, "weight decay of the optimizer", low=0)
    schedule: str = setting("cosine", "learning rate over the loop, from the peak to zero", choices=SCHEDULES)
    warmup: float = setting(
        0.0, "share of the loop in which the rate rises from zero; one-cycle: 0.3 where it is 0", low=0, high=1
    )
    accumulate: int = setting(1, "batches whose gradients make one optimizer step", low=1)
    clip: float | None = setting(None, "largest gradient norm", low=0)
    precision: str = setting("float32", "arithmetic of the forward passes, the teacher's too", choices=PRECISIONS)
    ema: float | None = setting(
        None,
        "decay of a moving average of the weights, which is kept; in step n at most (1 + n) / (10 + n)",
        low=0,
        high=1,
    )
    renorm: int = setting(
        0, "batches from which means and variances of batch norms are taken anew for the weights that are kept", low=0
    )
    mixup: float = setting(0.0, "blend pairs of samples and their losses, with shares from Beta(mixup, mixup)", low=0)
    cutmix: float = setting(0.0, "the same with a box of one image in another; with mixup, one of both", low=0)
    smoothing: float = setting(0.0, "share of each label that goes to all classes alike", low=0, high=1)
    hold_out: float = setting(0.1, "share of the training data held out for selection", low=0, high=0.5)
    keep: str = setting("best", "which weights are kept: best on the held-out split, or last", choices=("best", "last"))
    patience: int | None = setting(None, "epochs without improvement before it stops", low=1)
    refresh: float = setting(0.01, "share of the loop between two updates of what ramps", low=0, high=1)
    hard: float = setting(1.0, "weight of the task's own loss on the labels", low=0)
    scope: str = setting(
        "model",
        "what learns at a time: the model; or one block after another, to give what it gave in the teacher",
        choices=("model", "block"),
    )
    batches: int | None = setting(
        None, "scope block: batches of the training data that are held in memory and learned from; nothing: all", low=1
    )

    def __post_init__(self) -> None:
        for name in ramps(self):
            raise RecipeError(f"{self.name}.{name} cannot ramp; what ramps is a setting of a method under 'with'")
        check(self, self.name)
        if self.momentum >= 1 and self.optimizer != "sgd":
            raise RecipeError(f"{self.name}.momentum is {self.momentum}; {self.optimizer} takes it as beta1, below 1")
        others = ONE_MODEL if self.scope == "block" else ("batches",)
        for f in fields(self):
            if f.name in others and getattr(self, f.name) != f.default:
                raise RecipeError(f"{self.name}.{f.name} does not go with scope: {self.scope}; take one of them out")
        if self.scope == "block" and self.precision == "float16":
            raise RecipeError(f"{self.name}.precision: float16 needs scope: model; take bfloat16")


@dataclass(frozen=True)
class Recover(Train):
    """Win back what a lossy step lost: follow the logits of the model as it came, on inputs without labels."""

    name: ClassVar[str] = "recover"
    pieces: ClassVar[tuple[Mapping[str, Any], ...]] = ({"distill.logits": {"alpha": 0.0}},)

    epochs: int = setting(2, "passes over the training data", low=1)
    steps: int | None = setting(2000, "optimizer steps after which it ends, if the epochs have not", low=1)
    hold_out: float = setting(0.0, "share of the training data held out for selection (needs labels)", low=0, high=0.5)
    keep: str = setting("last", "which weights are kept: best on the held-out split, or last", choices=("best", "last"))
