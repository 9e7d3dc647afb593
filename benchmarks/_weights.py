"""Weights for entropy.py: two networks that were really trained, and a large tensor of random numbers."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from _bench import CACHE
from torch import nn

from smelt.grids.kmeans import assign, optimal

LLAMA = "llama-bytes/model.safetensors"
FLOATS = {"bf16": "e8", "fp16": "e5", "fp32": "e8"}
CODEBOOKS = {"k-means 16": 16, "k-means 256": 256}
SYMBOLS = (*CODEBOOKS, "int8", "int4", "int4 packed", "sparse gaps", "sparse bitmap", "sparse mask")
DATA = (*FLOATS, *SYMBOLS, "sparse values bf16")
GROUP = 128
PRUNED = 0.9


def llama() -> Path | None:
    """Where the language model is, if SMELT_DATA says so."""
    path = Path(os.environ.get("SMELT_DATA", "")) / LLAMA
    return path if "SMELT_DATA" in os.environ and path.is_file() else None


@lru_cache(maxsize=2)
def weights(network: str, size: int) -> list[np.ndarray]:
    """fp32 [rows, columns], one for each tensor.

    network: "llama"; "digits": `size` is its width, it is trained on the first call; "random": of `size` numbers.
    """
    if network == "llama":
        from safetensors.numpy import load_file

        path = llama()
        assert path is not None
        return [_rows(tensor.astype(np.float32)) for tensor in load_file(path).values()]
    return _digits(size) if network == "digits" else _random(size)


def _rows(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)


def _digits(width: int) -> list[np.ndarray]:
    """An MLP 64-width-width-10 trained until it is right on more than 99 % of scikit-learn's digits."""
    path = CACHE / f"digits-{width}.npz"
    if not path.exists():
        from sklearn.datasets import load_digits

        torch.manual_seed(0)
        x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        x = x.float() / 16
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
        share = 0.0
        while share <= 0.99:
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                share = float((model(x).argmax(1) == y).float().mean())
        part = path.with_suffix(".part.npz")
        np.savez(part, *[p.detach().numpy() for p in model.parameters()])
        os.replace(part, path)
    with np.load(path) as found:
        return [_rows(found[name]) for name in found.files]


def _random(size: int) -> list[np.ndarray]:
    """16 layers of standard deviations from 0.012 to 0.05, half normal and half Student's t of 5 degrees."""
    rng = np.random.default_rng(0)
    shape = (size // 16 // 1024, 1024)
    layers = []
    for i, scale in enumerate(np.geomspace(0.012, 0.05, 16)):
        drawn = rng.standard_t(5, shape) / np.sqrt(5 / 3) if i % 2 else rng.standard_normal(shape, np.float32)
        layers.append((drawn * scale).astype(np.float32))
    return layers


def elements(network: str, size: int, data: str) -> tuple[np.ndarray, str]:
    """The weights as `data` (of DATA), flat, and what they are to the entropy coder."""
    tensors = weights(network, size)
    flat = np.concatenate([tensor.reshape(-1) for tensor in tensors])
    if data in FLOATS:
        return _floats(flat, data), FLOATS[data]
    if data in CODEBOOKS:
        return assign(flat, optimal(flat, CODEBOOKS[data])), "int"
    if data == "int8":
        parts = [_steps(tensor, 127).astype(np.int8).reshape(-1) for tensor in tensors]
        return np.concatenate(parts).view(np.uint8), "int"
    if data.startswith("int4"):
        spare = -flat.size % GROUP
        groups = np.concatenate([flat, np.zeros(spare, np.float32)]).reshape(-1, GROUP)
        codes = (_steps(groups, 7) + 8).astype(np.uint8).reshape(-1)
        return (codes[0::2] | codes[1::2] << 4 if data == "int4 packed" else codes[: flat.size]), "int"
    size_of = np.abs(flat)
    kept = size_of > np.partition(size_of, int(PRUNED * flat.size))[int(PRUNED * flat.size)]
    if data == "sparse mask":
        return kept.view(np.uint8), "bool"
    if data == "sparse bitmap":
        return np.packbits(kept), "int"
    if data == "sparse gaps":
        return _gaps(kept), "int"
    return _floats(flat[kept], "bf16"), "e8"


def zero(network: str, size: int, data: str) -> int:
    """The symbol that stands for zero, or for what is nearest to it."""
    if data not in CODEBOOKS:
        return 8 if data == "int4" else 0
    flat = np.concatenate([tensor.reshape(-1) for tensor in weights(network, size)])
    return int(assign(np.zeros(1, np.float32), optimal(flat, CODEBOOKS[data]))[0])


def _floats(flat: np.ndarray, data: str) -> np.ndarray:
    if data == "bf16":
        return torch.from_numpy(flat).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return flat.astype(np.float16).view(np.uint16) if data == "fp16" else flat.view(np.uint32)


def _steps(rows: np.ndarray, most: int) -> np.ndarray:
    """Every row over its greatest magnitude, in -most..most."""
    top = np.abs(rows).max(1, keepdims=True)
    return np.rint(rows / np.where(top > 0, top, 1) * most)


def _gaps(kept: np.ndarray) -> np.ndarray:
    """How many zeros are before each weight that is kept; 255 is 255 of them, and more to come."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    found = np.full(int(ends[-1]), 255, np.uint8)
    found[ends - 1] = gaps % 255
    return found
