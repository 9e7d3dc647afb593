"""Which channels stand together in a vector, so that vectors are easy to share."""

from __future__ import annotations

import torch
from torch import Tensor

SWAPS = 20_000  # tried, at most
STALE = 2_000  # in a row that gain nothing, after which it ends
RIDGE = 1e-6


def found(samples: Tensor, units: int, seed: int) -> Tensor:
    """An order of channels in which vectors of `units` channels each, one after another, have a covariance of small
    determinant: what a code of vectors with a given rate loses grows with it (Martinez et al. 2021, section 3.2).

    Channels are dealt out by their variance, so that the places of a vector differ in it most; then two random ones are
    swapped where that lowers the determinant.

    Args:
        samples: [channels, values per channel, n].
        units: channels per vector; those beyond a multiple of it stay at the end.

    Returns:
        int64 [channels]: which channel comes first, second, ...
    """
    channels, each, _ = samples.shape
    pieces = channels // units
    centred = (samples - samples.mean(2, keepdim=True)).flatten(0, 1).double()
    gram = (centred @ centred.T / max(1, samples.shape[2])).reshape(channels, each, channels, each).cpu()
    loud = gram.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(1).argsort(descending=True, stable=True)
    own = loud[: pieces * units].reshape(units, pieces).T.clone()  # [pieces, units]
    blocks = torch.zeros(units * each, units * each, dtype=torch.float64)
    for piece in own:
        blocks += _block(gram, piece)
    ridge = RIDGE * blocks.diagonal().mean() * torch.eye(len(blocks), dtype=torch.float64)
    least, stale = float((blocks + ridge).logdet()), 0
    generator = torch.Generator().manual_seed(seed & 2**63 - 1)
    draws = torch.randint(0, 1 << 30, (SWAPS, 4), generator=generator).tolist() if pieces > 1 else []
    for a, b, i, j in draws:
        p, q, i, j = a % pieces, b % pieces, i % units, j % units
        if p == q:
            continue
        before = _block(gram, own[p]) + _block(gram, own[q])
        own[p, i], own[q, j] = own[q, j].item(), own[p, i].item()
        now = blocks + (_block(gram, own[p]) + _block(gram, own[q]) - before)
        value = float((now + ridge).logdet())
        if value < least - 1e-9:
            blocks, least, stale = now, value, 0
            continue
        own[p, i], own[q, j] = own[q, j].item(), own[p, i].item()
        stale += 1
        if stale == STALE:
            break
    return torch.cat((own.flatten(), loud[pieces * units :])).to(samples.device)


def _block(gram: Tensor, piece: Tensor) -> Tensor:
    """Second moments of the values of these channels, [units * each] squared."""
    return gram[piece][:, :, piece].flatten(2).flatten(0, 1)
