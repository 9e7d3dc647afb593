"""The optimizer of a loop, and its learning rate and momentum over the loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from smelt.core.errors import DataError
from smelt.core.train import Train

# One-cycle (Smith & Topin 2018, arXiv:1708.07120): the rate begins at 1/25 of its peak and ends at 1/25e4; meanwhile
# the momentum goes down by 0.1 and up again.
BEGIN, END, RISE, SWING = 1 / 25, 1 / 25e4, 0.3, 0.1


def rate(act: Train, progress: float) -> float:
    """Factor of the learning rate at `progress` in 0..1."""
    if act.schedule == "one-cycle":
        return _cycle(act, progress, BEGIN, 1.0, END)
    if progress < act.warmup:
        return progress / act.warmup
    t = (progress - act.warmup) / max(1e-9, 1 - act.warmup)
    if act.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    return 1 - t if act.schedule == "linear" else 1.0


def momentum(act: Train, progress: float) -> float:
    low = max(0.0, act.momentum - SWING)
    return _cycle(act, progress, act.momentum, low, act.momentum) if act.schedule == "one-cycle" else act.momentum


def _cycle(act: Train, progress: float, begin: float, peak: float, end: float) -> float:
    rise = act.warmup or RISE
    if progress < rise:
        a, b, t = begin, peak, progress / rise
    else:
        a, b, t = peak, end, (progress - rise) / max(1e-9, 1 - rise)
    return b + (a - b) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


class SignSGD(torch.optim.Optimizer):
    """x -= lr sign(m), m the gradient, or its moving average for a momentum above 0 (Bernstein et al. 2018,
    arXiv:1802.04434)."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                way = p.grad
                if group["momentum"]:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    way = mean.lerp_(way, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(way.sign(), alpha=-group["lr"])


def optimizer_of(act: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if not parameters:
        raise DataError(f"{act.name} finds nothing to learn: no parameter and no floating leaf requires a gradient")
    if act.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, act.lr, act.momentum, weight_decay=act.weight_decay, nesterov=act.momentum > 0
        )
    if act.optimizer == "sign":
        return SignSGD(parameters, act.lr, act.momentum, act.weight_decay)
    cls = torch.optim.AdamW if act.optimizer == "adamw" else torch.optim.Adam
    return cls(parameters, act.lr, betas=(act.momentum, 0.999), weight_decay=act.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, act: Train, progress: float) -> float:
    """Set what holds for the next step; returns the learning rate."""
    now = act.lr * rate(act, progress)
    moving: dict[str, Any] = {"lr": now}
    if act.schedule == "one-cycle" and act.momentum > 0:
        value = momentum(act, progress)
        moving |= {"momentum": value} if act.optimizer in ("sgd", "sign") else {"betas": (value, 0.999)}
    for group in optimizer.param_groups:
        group.update(moving)
    return now
