"""Modules that normalise along the last dimension, known by what they do: LayerNorm, RMSNorm, and whatever acts alike.

rms     y = x / sqrt(mean(x^2) + eps) * gain + bias
layer   the same of x - mean(x)
batch   batch norm along dimension 1, in evaluation mode
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import evaluating, forward_or_raise

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# How near a module must come to the formula; some work in float32 whatever they are given.
_NEAR = 1e-4


@dataclass(frozen=True)
class Norm:
    """path: of the module.  gain, bias: names of its tensors in the model, '' for none.  neutral: the value of the
    gain's tensor at which nothing is scaled (0 where the code takes 1 + weight)."""

    path: str
    kind: str
    gain: str = ""
    bias: str = ""
    neutral: float = 1.0


def norms(model: nn.Module, example: Any) -> dict[str, Norm]:
    """Path -> norm, of the modules that the example reaches."""
    sizes: dict[str, int] = {}
    with evaluating(model), ExitStack() as hooks:
        for path, module in model.named_modules():
            if path and _may_be(module):

                def see(_: nn.Module, args: Any, out: Any, path: str = path) -> None:
                    x = args[0] if args else None
                    if isinstance(x, Tensor) and isinstance(out, Tensor) and x.shape == out.shape and x.dim() > 1:
                        sizes[path] = x.shape[-1]

                hooks.callback(module.register_forward_hook(see).remove)
        forward_or_raise(model, example, "while its norms are looked at")
    found = {path: _probe(path, model.get_submodule(path), size) for path, size in sizes.items()}
    return {path: norm for path, norm in found.items() if norm is not None}


def _may_be(module: nn.Module) -> bool:
    if isinstance(module, _BATCH):
        return module.running_mean is not None
    shapes = [tuple(p.shape) for p in module.parameters()]
    if any(len(shape) != 1 for shape in shapes) or len(set(shapes)) > 1 or len(shapes) > 2:
        return False
    inherent = type(module).__module__.startswith("torch.nn") and not isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    return not (inherent and not shapes) and not any(module.children())


@torch.no_grad()
def _probe(path: str, module: nn.Module, size: int) -> Norm | None:
    if isinstance(module, _BATCH):
        gain, bias = (f"{path}.{n}" if module.affine else "" for n in ("weight", "bias"))
        return Norm(path, "batch", gain, bias)
    names = [name for name, _ in module.named_parameters()]
    if any(p.numel() != size for p in module.parameters()):
        return None
    try:
        probe = copy.deepcopy(module).double().eval()
        x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = 1000 * (x + 0.5).to(next(module.parameters(), x).device)
        for gain in names or [""]:
            for neutral in (1.0, 0.0) if names else (1.0,):
                if (kind := _acts(probe, x, gain, neutral)) is not None:
                    bias = next((f"{path}.{name}" for name in names if name != gain), "")
                    return Norm(path, kind, f"{path}.{gain}" if gain else "", bias, neutral)
    except Exception:  # foreign code fails in any way it likes
        return None
    return None


def _acts(probe: nn.Module, x: Tensor, gain: str, neutral: float) -> str | None:
    own = dict(probe.named_parameters())
    for name, value in own.items():
        value.fill_(neutral if name == gain else 0.0)
    y = probe(x)
    middle = x - x.mean(-1, keepdim=True)
    base = {
        "rms": x / x.square().mean(-1, keepdim=True).sqrt(),
        "layer": middle / middle.square().mean(-1, True).sqrt(),
    }
    kind = next((k for k, z in base.items() if torch.allclose(y.double(), z, _NEAR, _NEAR)), None)
    if kind is None or not own:
        return kind
    generator = torch.Generator().manual_seed(1)
    for value in own.values():
        value.copy_(torch.rand(len(value), generator=generator, dtype=torch.float64) + 0.5)
    wanted = base[kind] * (own[gain] + 1 - neutral) + sum(v for n, v in own.items() if n != gain)
    return kind if torch.allclose(probe(x).double(), wanted, _NEAR, _NEAR) else None
