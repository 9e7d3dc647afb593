"""Stories in tokens, for the small model that was trained on such: what it is calibrated with and judged by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

BOS = 1
HELD = 128  # the last so many stories are what models are judged by
LENGTH = 256
LONGEST = 512


def _stories(folder: Path) -> list[np.ndarray]:
    tokens = np.load(folder.parent / "tinystories_917_tokens_uint16.npy").astype(np.int64)
    return np.split(tokens, np.flatnonzero(tokens == BOS)[1:])


def calibration(folder: Path, count: int, seed: int) -> Tensor:
    """int64 [count, 256]: the beginnings of stories that are long enough, drawn anew for every seed."""
    long = [story[:LENGTH] for story in _stories(folder)[:-HELD] if len(story) >= LENGTH]
    chosen = np.random.default_rng(seed).choice(len(long), min(count, len(long)), replace=False)
    return torch.from_numpy(np.stack([long[i] for i in chosen]))


@torch.no_grad()
def perplexity(model: nn.Module, folder: Path, count: int = HELD) -> float:
    """Per token, over the held-out stories, each from its beginning and cut at 512 tokens."""
    total, tokens = 0.0, 0
    for story in _stories(folder)[-HELD:][:count]:
        ids = torch.from_numpy(story[:LONGEST])
        logits = model(ids[None])[0, :-1].double()
        total += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
        tokens += len(ids) - 1
    return math.exp(total / tokens)
