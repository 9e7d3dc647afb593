"""Peers of prune_lm.py: the algorithms as their papers and first code have them, on the Llama of `_llama.py`.

Nothing of smelt is used here.  Each goes through the decoder block by block: the inputs of the linear layers of a
block are gathered with the blocks before it pruned and it dense, then its layers are pruned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _llama import Llama
from torch import Tensor, nn

Prune = Callable[[nn.Linear, Tensor], None]


@torch.no_grad()
def prune(model: Llama, method: str, pattern: str | None, calibration: Tensor) -> None:
    """Half of the weights of every linear layer of the decoder blocks, or 2 of every 4."""
    layers = model.model.layers
    if method == "magnitude":
        for layer in layers:
            for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
                linear.weight.mul_(_best(linear.weight.abs(), pattern, whole=True))
        return
    act: Prune = {"wanda": _wanda, "sparsegpt": _sparsegpt}[method](pattern)
    hidden, turn = model.model.embed_tokens(calibration), model.model.turn(calibration)
    for layer in layers:
        grams: dict[nn.Linear, Tensor] = {}
        hooks = [m.register_forward_pre_hook(_adder(grams)) for m in layer.modules() if isinstance(m, nn.Linear)]
        for one in hidden.split(1):
            layer(one, turn)
        for hook in hooks:
            hook.remove()
        for linear, gram in grams.items():
            act(linear, gram / hidden[..., 0].numel())
        hidden = torch.cat([layer(one, turn) for one in hidden.split(8)])


def _adder(grams: dict[nn.Linear, Tensor]) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def add(module: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(module, nn.Linear)
        x = args[0].reshape(-1, args[0].shape[-1])
        grams[module] = grams.get(module, 0) + x.T @ x

    return add


def _best(score: Tensor, pattern: str | None, whole: bool) -> Tensor:
    """0/1: the better half, of the whole matrix or of each row; or the 2 best of every 4 in a row."""
    groups = score.reshape(-1, 4) if pattern else score.reshape(1, -1) if whole else score
    losers = groups.argsort(dim=1, stable=True)[:, : groups.shape[1] // 2]
    return torch.ones_like(groups).scatter_(1, losers, 0).reshape(score.shape)


def _wanda(pattern: str | None) -> Prune:
    """Sun et al. 2023, algorithm 1."""

    def act(linear: nn.Linear, gram: Tensor) -> None:
        score = linear.weight.abs() * gram.diagonal().sqrt().reshape(1, -1)
        linear.weight.mul_(_best(score, pattern, whole=False))

    return act


def _sparsegpt(pattern: str | None, damp: float = 0.01, width: int = 128) -> Prune:
    """Frantar & Alistarh 2023, algorithm 1."""

    def act(linear: nn.Linear, hessian: Tensor) -> None:
        w, columns = linear.weight.clone(), linear.in_features
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        w[:, dead] = 0
        hessian += damp * hessian.diagonal().mean() * torch.eye(columns)
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        for a in range(0, columns, width):
            b = min(a + width, columns)
            errors = torch.zeros(len(w), b - a)
            if pattern is None:
                score = w[:, a:b].square() / inverse.diagonal()[a:b].square()
                keep = _best(score, None, whole=True)
            for i in range(a, b):
                if pattern is not None and i % 4 == 0:
                    score = w[:, i : i + 4].square() / inverse.diagonal()[i : i + 4].square()
                    group = _best(score, pattern, whole=False)
                kept = w[:, i] * (keep[:, i - a] if pattern is None else group[:, i % 4])
                errors[:, i - a] = (w[:, i] - kept) / inverse[i, i]
                w[:, i:b] -= errors[:, i - a].outer(inverse[i, i:b])
                w[:, i] = kept
            w[:, b:] -= errors @ inverse[a:b, b:]
        linear.weight.copy_(w)

    return act
