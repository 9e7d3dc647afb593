"""MNIST for the benchmarks: splits, augmented copies, and an ensemble of teachers whose outputs are recorded once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _bench import CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smelt import Batches, Data

HELD_OUT = 5000


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images float [n, 1, 28, 28] in 0..1 and labels [n]."""
    with np.load(folder / f"{split}.npz") as z:
        return torch.from_numpy(z["x"]).float().div(255)[:, None], torch.from_numpy(z["y"]).long()


def data(folder: Path, seed: int, batch_size: int, train: int | None = None) -> Data:
    """The data set, training images shifted at random; `HELD_OUT` of them, drawn by seed, for selection."""
    x, y = read(folder, "train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:HELD_OUT], order[HELD_OUT:][:train]
    return Data(
        Batches(x[rest], y[rest], batch_size, shuffle=True, seed=seed, transform=shift),
        Batches(x[held], y[held], 1000),
        Batches(*read(folder, "test"), 1000),
        name="MNIST",
    )


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each quarter of a batch moved by at most one pixel each way (the images have black borders)."""
    moves = torch.randint(-1, 2, (4, 2), generator=generator).tolist()
    return torch.cat([torch.roll(part, move, (2, 3)) for part, move in zip(x.chunk(4), moves, strict=False)])


def augment(x: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Random affine maps (12 degrees, 12 % scale and shear, 2 pixels, times strength) and a smooth elastic field."""
    n = len(x)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * strength

    angle, scale, shear = draw(n) * 12 * math.pi / 180, torch.exp(draw(n, 2) * 0.12), draw(n) * 0.12
    cos, sin = angle.cos(), angle.sin()
    theta = torch.empty(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale[:, 0], shear - sin * scale[:, 1]
    theta[:, 1, 0], theta[:, 1, 1] = sin * scale[:, 0], cos * scale[:, 1]
    theta[:, :, 2] = draw(n, 2) * 2 / 14
    field = torch.randn(n, 2, 5, 5, generator=generator) * (strength * 0.9 / 14)
    smooth = F.interpolate(field, size=28, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    grid = F.affine_grid(theta, [n, 1, 28, 28], align_corners=False) + smooth
    return F.grid_sample(x, grid, align_corners=False)


class Teacher(nn.Module):
    """A small convolutional network with batch norm, about 130 k parameters."""

    def __init__(self, width: int = 24):
        super().__init__()

        def block(inputs: int, outputs: int, size: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        w = width
        self.body = nn.Sequential(
            *(block(1, w, 5), nn.MaxPool2d(2), block(w, 2 * w, 3), block(2 * w, 2 * w, 3), nn.MaxPool2d(2)),
            *(block(2 * w, 4 * w, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36 * w, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.contiguous(memory_format=torch.channels_last))


def train_teacher(folder: str, seed: int, epochs: int, images: int | None) -> float:
    """Train one teacher on fresh augmentations each epoch, write it; returns its error on held-out images, %."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = read(Path(folder), "train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # the split of `guided`
    held, rest = order[:HELD_OUT], order[HELD_OUT:][:images]
    x_train, y_train, size = x[rest], y[rest], 256
    model = Teacher().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-2)
    steps = epochs * (len(x_train) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        model.train()
        seen = torch.cat([augment(part, generator) for part in x_train.split(5000)])
        for index in torch.randperm(len(seen), generator=generator)[: len(seen) // size * size].split(size):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(seen[index])
            loss = F.cross_entropy(outputs.float(), y_train[index], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save_file(model.state_dict(), teacher_path(seed, epochs, images))
    model.eval()
    with torch.no_grad():
        wrong = sum(
            int((model(a).argmax(1) != b).sum()) for a, b in zip(x[held].split(1000), y[held].split(1000), strict=True)
        )
    return 100 * wrong / len(held)


def teacher_path(seed: int, epochs: int, images: int | None) -> Path:
    CACHE.mkdir(exist_ok=True)
    return CACHE / f"teacher-{seed}-{epochs}-{images or 'all'}.safetensors"


@torch.no_grad()
def record(folder: str, copy: int, strength: float, teachers: list[str]) -> str:
    """One augmented copy of the training images (copy 0 is clean) with the teachers' mean log-probabilities."""
    path = CACHE / f"copy-{copy}-{strength}-{len(teachers)}-{Path(teachers[0]).stem}.safetensors"
    if path.exists():
        return str(path)
    x, _ = read(Path(folder), "train")
    generator = torch.Generator().manual_seed(1000 + copy)
    seen = x if copy == 0 else torch.cat([augment(part, generator, strength) for part in x.split(5000)])
    models = []
    for name in teachers:
        model = Teacher().to(memory_format=torch.channels_last).eval()
        model.load_state_dict(load_file(name))
        models.append(model)
    parts = []
    for part in seen.split(1000):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(torch.stack([F.log_softmax(m(part).float(), 1) for m in models]).mean(0))
    part_path = path.with_suffix(".part")
    save_file({"x": seen.mul(255).round().byte(), "logits": torch.cat(parts).half()}, part_path)
    part_path.rename(path)
    return str(path)
