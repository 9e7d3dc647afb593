"""MNIST for the benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smelt import Batches, Data
from smelt.core.data import fingerprint

HELD_OUT = 5000


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images float [n, 1, 28, 28] in 0..1 and labels [n]."""
    with np.load(folder / f"{split}.npz") as z:
        return torch.from_numpy(z["x"]).float().div(255)[:, None], torch.from_numpy(z["y"]).long()


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each quarter of a batch moved by at most one pixel each way (the images have black borders)."""
    moves = torch.randint(-1, 2, (4, 2), generator=generator).tolist()
    return torch.cat([torch.roll(part, move, (2, 3)) for part, move in zip(x.chunk(4), moves, strict=False)])


def data(folder: Path, seed: int, batch_size: int, train: int | None = None) -> Data:
    """The data set, training images shifted at random; `HELD_OUT` of them, drawn by seed, are for selection."""
    x, y = read(folder, "train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:HELD_OUT], order[HELD_OUT:][:train]
    splits = {
        "train": Batches(x[rest], y[rest], batch_size, shuffle=True, seed=seed, transform=shift),
        "valid": Batches(x[held], y[held], 1000),
        "test": Batches(*read(folder, "test"), 1000),
    }
    return Data(**splits, name="MNIST", fingerprint=fingerprint(splits))
