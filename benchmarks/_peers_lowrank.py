"""Peers of lowrank_lm.py: the algorithms as their papers have them, on the Llama of `_llama.py`.

Nothing of smelt is used here.  Every linear layer of the decoder blocks gets the product of two factors in its place,
of the rank with which they have `share` of its parameters.
"""

from __future__ import annotations

import torch
from _llama import Llama
from torch import Tensor, nn
from torch.nn import functional


def factor(model: Llama, method: str, share: float, calibration: Tensor) -> None:
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    seen = {"FWSVD": _fisher, "ASVD": _absolute, "SVD-LLM": _gram}.get(method)
    known = seen(model, layers, calibration) if seen else {}
    with torch.no_grad():
        for layer in layers:
            w = layer.weight.double()
            rank = int(share * w.numel() / sum(w.shape))
            scale = _scale(method, known[layer].double()) if known else torch.eye(w.shape[1]).double()
            u, s, v = torch.linalg.svd(w @ scale, full_matrices=False)
            layer.weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(scale))


def _scale(method: str, seen: Tensor) -> Tensor:
    if method in ("FWSVD", "ASVD"):
        # Hsu et al. 2022, arXiv:2207.00112, eq. 5, of rows of W^T; Yuan et al. 2023, arXiv:2312.05821, alpha = 0.5
        return seen.sqrt().clamp_min(1e-12).diag()
    # Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3.1; raised, as in their code, where it is not positive
    lowest = torch.linalg.eigvalsh(seen)[0]
    raised = seen + (1e-6 - lowest) * torch.eye(len(seen)) if lowest <= 0 else seen
    return torch.linalg.cholesky(raised)


def _fisher(model: Llama, layers: list[nn.Linear], ids: Tensor) -> dict[nn.Linear, Tensor]:
    """Squared gradients of single windows, summed over the outputs of each layer."""
    found = {layer: torch.zeros(layer.in_features) for layer in layers}
    for one in ids.split(1):
        loss = functional.cross_entropy(model(one)[:, :-1].flatten(0, 1), one[:, 1:].flatten())
        slopes = torch.autograd.grad(loss, [layer.weight for layer in layers])
        for layer, slope in zip(layers, slopes, strict=True):
            found[layer] += slope.square().sum(0)
    return found


@torch.no_grad()
def _gather(model: Llama, layers: list[nn.Linear], ids: Tensor, absolute: bool) -> dict[nn.Linear, Tensor]:
    found: dict[nn.Linear, Tensor] = {}

    def see(layer: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(layer, nn.Linear)
        x = args[0].reshape(-1, args[0].shape[-1])
        found[layer] = found.get(layer, 0) + (x.abs().sum(0) / ids.numel() if absolute else (x.T @ x).double())

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    for one in ids.split(8):
        model(one)
    for hook in hooks:
        hook.remove()
    return found


def _absolute(model: Llama, layers: list[nn.Linear], ids: Tensor) -> dict[nn.Linear, Tensor]:
    return _gather(model, layers, ids, True)


def _gram(model: Llama, layers: list[nn.Linear], ids: Tensor) -> dict[nn.Linear, Tensor]:
    return _gather(model, layers, ids, False)
