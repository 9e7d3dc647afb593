"""The state of a loop on disk: written every so often, read once after a kill, to go on as if nothing had happened."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from smelt.core.output import replacing
from smelt.train.training import training


@dataclass
class Place:
    """Where a loop stands.

    batch: batches of this epoch that are done; all of them, where only what ends an epoch is left to do.
    total, count: the sum of the losses of this epoch, and of how many steps.
    """

    epoch: int = 0
    batch: int = 0
    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


@dataclass
class Best:
    """The best epoch so far on the held-out split; of equals the later, for a tie has trained longer."""

    value: float = -math.inf
    gained: int = 0  # the epoch of the last real gain
    state: dict[str, Tensor] | None = None


@dataclass
class Running:
    """All that moves in a loop.

    random: states of the random number generators, one row for each process; None between two epochs.
    """

    t: training
    optimizer: torch.optim.Optimizer
    scaler: Any  # torch.amp.GradScaler
    average: Any  # Average or None
    place: Place
    best: Best
    random: Tensor | None = None


def save(path: Path, run: Running, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
    """As a safetensors file, renamed into place.

    moments: what the optimizer remembers, by the number of the parameter.
    """
    groups = {"now": run.t.state(), "best": run.best.state or {}}
    groups["average"] = {} if run.average is None else run.average.values
    groups["random"] = {} if run.random is None else {"": run.random}
    tensors = {f"{group}/{k}": v.contiguous() for group, found in groups.items() for k, v in found.items()}
    for index, values in moments.items():
        for name, value in values.items():
            tensors[f"optimizer/{index}/{name}"] = value.clone().contiguous()
    meta = {
        "place": asdict(run.place),
        "done": run.t.done,
        "best": run.best.value,
        "gained": run.best.gained,
        "plans": run.t.plans(),
        "scaler": run.scaler.state_dict(),
    }
    data = to_bytes(tensors, {"smelt": json.dumps(meta)})
    with replacing(path, True, len(data)) as file:
        file.write(data)


def resume(path: Path, run: Running) -> None:
    """The inverse, in a loop that was made the same way; a damaged file counts as none."""
    fresh = run.t.state()
    try:
        with safe_open(str(path), "pt") as f:
            meta = json.loads(f.metadata()["smelt"])
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  (not a mapping)
        state: dict[int, dict[str, Any]] = {}
        groups: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "average": {}, "random": {}}
        for key, value in tensors.items():
            group, _, name = key.partition("/")
            if group == "optimizer":
                index, _, name = name.partition("/")
                state.setdefault(int(index), {})[name] = value
            else:
                groups[group][name] = value
        place = Place(**meta["place"])
        best = Best(float(meta["best"]), int(meta["gained"]), groups["best"] or None)
        run.t.resume(int(meta["done"]), meta["plans"])
        run.t.load(groups["now"])
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
        run.scaler.load_state_dict(meta["scaler"])
        if run.average is not None:
            device = {name: value.device for name, value in fresh.items()}
            run.average.values = {k: v.to(device.get(k, v.device)) for k, v in groups["average"].items()}
        run.place, run.best, run.random = place, best, groups["random"].get("")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        path.unlink(missing_ok=True)
        run.t.restart(fresh)
