"""Trees as a reader of files meets them."""

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis.extra import numpy as hnp
from torch import Tensor

from smelt.core.encoded import Encoded, awaken
from smelt.core.errors import FileError

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
seeds = st.integers(0, 2**31)


def check(node: Tensor | Encoded) -> None:
    """Every form of a tree judges the claims of its parts."""
    if isinstance(node, Encoded):
        claims = {k: (torch.Size(p.shape), p.dtype) for k, p in node.parts.items()}
        node.form.check(claims, node.shape, node.dtype)
        for part in node.parts.values():
            check(part)


def read(node: Encoded) -> Tensor:
    """Check, awaken, decode."""
    check(node)
    awake = awaken(node)
    return awake if isinstance(awake, Tensor) else awake.decode()


def survives(node: Encoded) -> bool:
    """Whether a damaged tree can be read; if so it has its shape, if not the error is a FileError."""
    try:
        found = read(node)
    except FileError:
        return False
    assert found.shape == node.shape and found.dtype == node.dtype
    return True


def damaged(tree: Encoded, seed: int, rounds: int = 30) -> Iterator[Encoded]:
    """Trees with one leaf truncated, extended, reshaped, of another dtype, or with a few bytes exchanged."""
    rng = np.random.default_rng(seed)
    paths = [path for path, _ in tree.leaves()]
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.reshape(-1)[: rng.integers(0, max(t.numel(), 1))],
        lambda t: torch.cat((t.reshape(-1), t.reshape(-1)[:1])),
        lambda t: t.reshape(1, *t.shape),
        lambda t: t.to(torch.int64 if t.dtype is not torch.int64 else torch.float32),
        *[lambda t: _noise(t, rng)] * 6,
    ]
    for _ in range(rounds):
        victim, change = paths[rng.integers(len(paths))], changes[rng.integers(len(changes))]
        yield tree.map(lambda path, leaf, v=victim, c=change: c(leaf) if path == v else leaf)  # type: ignore[misc]


def _noise(t: Tensor, rng: np.random.Generator) -> Tensor:
    if not t.numel():
        return t
    if t.dtype is torch.bool:
        return t ^ torch.from_numpy(rng.random(t.shape) < 0.2)
    raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().copy()
    raw[rng.integers(0, raw.size, rng.integers(1, 4))] = rng.integers(0, 256)
    return torch.from_numpy(raw).view(t.dtype).reshape(t.shape)


def bits_of(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
