"""CIFAR-10 from JPEG, and the residual networks that were trained on it, for the benchmarks.

The networks: K. He et al. 2016 (arXiv:1512.03385), section 4.2, shortcuts of option A (no parameters): every second
pixel, and zeros for the channels that are new.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import Row, arguments, conditions, data_folder, finish, run_cells
from torch import Tensor, nn
from torch.nn import functional

from smelt import Batches, Data
from smelt.core.data import fingerprint

FOLDERS = ("cifar10_jpeg", "resnet_cifar10")
WEIGHTS = {"ResNet-20": "resnet20_jpegft.pth", "ResNet-56": "resnet56-4bfd9763.th"}
ADAPTED = ("ResNet-20",)  # trained on JPEGs already
DEPTH = {"ResNet-20": 3, "ResNet-56": 9}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.pad = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """`blocks` in each of three stages; 6 blocks + 2 layers."""

    def __init__(self, blocks: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        before = 16
        for stage, after in enumerate((16, 32, 64), 1):
            parts = [Block(before if not i else after, after, 2 if stage > 1 and not i else 1) for i in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*parts))
            before = after
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(blocks: int = 3) -> ResNet:
    return ResNet(blocks)


def network(name: str, folder: Path) -> ResNet:
    """The trained network, in evaluation mode."""
    model = ResNet(DEPTH[name])
    state = torch.load(folder / "resnet_cifar10" / WEIGHTS[name], weights_only=True, map_location="cpu")
    state = {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
    model.load_state_dict(state)
    return model.eval()


def read(folder: Path, split: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 3, 32, 32] and labels [n], in an order that is random once and for all."""
    kept = cache / f"cifar10-{split}.npz"
    if not kept.exists():
        from PIL import Image

        with np.load(folder / "cifar10_jpeg" / f"{split}.npz") as z:
            jpegs, at, labels = z["jpegs"], z["offsets"], z["labels"]
        decoded = [np.asarray(Image.open(io.BytesIO(jpegs[a:b].tobytes())).convert("RGB")) for a, b in pairwise(at)]
        order = np.random.default_rng(0).permutation(len(labels))
        part = kept.with_suffix(".part.npz")
        np.savez(part, x=np.stack(decoded).transpose(0, 3, 1, 2)[order], y=labels[order].astype(np.int64))
        part.replace(kept)
    with np.load(kept) as z:
        return torch.from_numpy(z["x"]), torch.from_numpy(z["y"])


def scaled(x: Tensor) -> Tensor:
    """uint8 images as the networks take them."""
    return (x.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored at random, each image; shifted by up to four pixels, each eighth of a batch."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    padded = functional.pad(x, (4, 4, 4, 4))
    corners = torch.randint(0, 9, (8, 2), generator=generator).tolist()
    parts = [p[:, :, i : i + 32, j : j + 32] for p, (i, j) in zip(padded.chunk(8), corners, strict=False)]
    return torch.cat(parts)


def data(
    folder: Path,
    cache: Path,
    seed: int,
    train: int,
    test: int | None = None,
    batch: int = 128,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = moved,
) -> Data:
    """The first `train` images of the split to train on, drawn in an order by seed, and the first `test` to test on."""
    x, y = read(folder, "train", cache)
    splits = {"train": Batches(scaled(x[:train]), y[:train], batch, shuffle=True, seed=seed, transform=change)}
    x, y = read(folder, "test", cache)
    splits["test"] = Batches(scaled(x[:test]), y[:test], 500)
    return Data(**splits, name="CIFAR-10 as JPEG", fingerprint=fingerprint(splits))


def root() -> Path | None:
    """The folder of the data if all that the networks need is in it; otherwise it is said what is missing."""
    folders = [data_folder(name) for name in FOLDERS]
    return None if any(folder is None for folder in folders) else Path(str(folders[0])).parent


def run(
    name: str,
    description: str,
    grid: Callable[[Any, Path], list[dict[str, Any]]],
    cell: Callable[..., Any],
    rows: Callable[[list[dict[str, Any]], list[Any]], list[Row]],
    seconds: Callable[[list[dict[str, Any]]], float],
    ready: Callable[[str, Path], Any] | None = None,
) -> int:
    """The main of a benchmark: exit status.

    Args:
        grid: flags and folder of the data -> cells.
        seconds: what one of the cells takes, on average.
        ready: called for each network of the cells before they run, to train it once for all.
    """
    args, folder = arguments(description), root()
    if folder is None:
        return 4
    print(conditions())
    cells = grid(args, folder)
    for network in {one["name"] for one in cells} if ready else ():
        assert ready is not None
        ready(network, folder)
    runs = run_cells(name, cell, cells, jobs=args.jobs, fresh=args.fresh, seconds=seconds(cells))
    finish(rows(cells, runs), args.json)
    return 0
