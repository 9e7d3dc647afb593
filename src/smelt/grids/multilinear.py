"""Factors of a weight, fitted one at a time to what the weight gives on its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Build = Callable[..., Tensor]


def loss(weight: Tensor, near: Tensor, gram: Tensor | None = None) -> float:
    """tr(D G D^T) of D = weight - near as matrices [out, k]; G = 1 without `gram` [k, k].

    With the second moment of the inputs as G it is the mean of the squared change of the layer's output.
    """
    d = (weight - near).flatten(1)
    return float((d * (d if gram is None else d @ gram)).sum())


def solve(
    weight: Tensor, factors: Sequence[Tensor], index: int, build: Build, gram: Tensor | None = None, steps: int = 10
) -> Tensor:
    """A factor that brings `build(*factors)`, linear in each of them, closer to the weight.

    Conjugate gradients for the least squares, from where the factor is: no step increases `loss`.

    Args:
        weight: [out, ...]; with `build` it gives the same shape.
        index: which of the factors.
        gram: [k, k] for the flattened rest of dimension 0; None for the identity.
    """
    before = [f.detach() for f in factors]
    spot = before[index].clone().requires_grad_()

    with torch.enable_grad():
        built = build(*before[:index], spot, *before[index + 1 :])

    def there(x: Tensor) -> Tensor:
        return build(*before[:index], x, *before[index + 1 :]).flatten(1)

    def back(y: Tensor) -> Tensor:
        y = y if gram is None else y @ gram
        return torch.autograd.grad(built, spot, y.reshape(built.shape), retain_graph=True)[0]

    x = before[index].clone()
    r = back(weight.flatten(1) - there(x))
    p, rr = r.clone(), float(r.square().sum())
    enough = 1e-24 * rr
    for _ in range(steps):
        if rr <= enough:
            break
        q = back(there(p))
        curve = float((p * q).sum())
        if curve <= 0:
            break
        x, r = x + rr / curve * p, r - rr / curve * q
        new = float(r.square().sum())
        p, rr = r + new / rr * p, new
    return x


def refine(
    weight: Tensor,
    factors: Sequence[Tensor],
    build: Build,
    gram: Tensor,
    rounds: int = 4,
    steps: int = 10,
    enough: float = 1e-3,
) -> list[Tensor]:
    """The factors after `rounds` of `solve` for each in turn, or once a round gains less than the share `enough`."""
    found = list(factors)
    error = loss(weight, build(*found), gram)
    for _ in range(rounds):
        for i in range(len(found)):
            found[i] = solve(weight, found, i, build, gram, steps)
        before, error = error, loss(weight, build(*found), gram)
        if error >= (1 - enough) * before:
            break
    return found
