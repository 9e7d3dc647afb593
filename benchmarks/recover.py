"""What recovery is worth: a trained ResNet-20 on CIFAR-10, compressed in five ways, then recovered.

    SMELT_DATA=... python benchmarks/recover.py

    nothing      as the lossy step leaves it
    recover      `recover: {...}` on the step: towards the outputs of the network before, on images without labels
    both         full training: the same loop with labels and the network before
    --long       labels alone; a tenth of the images without labels, as many times more often

All loops see as many images in the same number of steps; seconds are the loop's CPU time, on one thread of a shared
machine.  The images are JPEGs, on which the network was trained; 10,000 of them (50,000 with --long) are used here.
Accuracy is taken on the 10,000 test images.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import _cifar
import torch
from _bench import CACHE, Row, arguments, conditions, finish, run_cells
from prune_cifar import accuracy, network

import smelt
from smelt.core.data import Batches
from smelt.core.progress import Progress

IMAGES, BATCH, EPOCHS = 10000, 128, 2
LOOP = {"epochs": EPOCHS, "lr": 1e-3, "precision": "bfloat16", "hold_out": 0.0, "keep": "last"}
TEACH = {"distill.logits": {"alpha": 0.3}}
INSIDE = "layer*"  # the first convolution and the last layer are small, and are left alone where bits are few
LOSSY: dict[str, list[dict[str, Any]]] = {
    "90 % zeros": [{"prune.weights": {"ratio": 0.9, "scope": "global"}}],
    "a third of the MACs": [{"prune.channels": {"ratio": 2 / 3, "of": "macs"}}],
    "4 shared values": [{"share.kmeans": {"clusters": 4, "on": INSIDE}}],
    "4-bit weights and inputs": [
        {"quantize.affine": {"bits": 4, "on": INSIDE}},
        {"quantize.affine": {"bits": 4, "at": "input", "dynamic": False, "on": INSIDE}},
    ],
    "rank for a quarter": [{"lowrank.svd": {"ratio": 0.25, "weight": "inputs", "refit": True, "on": INSIDE}}],
}
TENTH = "recover, a tenth of the images"
WAYS: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "recover": {"recover": LOOP},
    "both": {"train": LOOP | {"with": [TEACH]}},
}
MORE: dict[str, dict[str, Any]] = {
    TENTH: {"recover": LOOP | {"epochs": 10 * EPOCHS}},
    "labels": {"train": LOOP},
}


class Clock(Progress):
    """CPU seconds of this thread in steps that train."""

    seconds, since = 0.0, None

    def begin(self, index: int, count: int, label: str) -> None:
        self.since = time.thread_time() if label in ("recover", "train") else None

    def advance(self, done: int, total: int, text: str = "") -> None:
        if self.since is not None:
            self.seconds = time.thread_time() - self.since


def cell(lossy: str, way: str, seed: int, folder: str, images: int, test: int | None) -> Any:
    """The network after one lossy step, recovered in one way; and how long that took."""
    torch.set_num_threads(1)
    path = Path(folder)
    model = network("ResNet-20", path)
    data = _cifar.data(path, CACHE, seed, images // 10 if way == TENTH else images, test, BATCH)
    assert isinstance(data.test, Batches) and isinstance(data.train, Batches)
    train, step, clock = data.train, (WAYS | MORE)[way], Clock()
    if step is None or "recover" in step:
        train = Batches(train.inputs, None, BATCH, True, seed, train.transform)
    job = smelt.Job(data=smelt.Data(train=train), teacher=model, seed=seed, latency=False)
    steps = [*LOSSY[lossy], *([step] if step else [])]
    after = smelt.compress(model, {"steps": steps}, job, progress=clock).model
    found = {"accuracy": accuracy(after, data.test), "seconds": clock.seconds}
    return found | ({"original": accuracy(model, data.test)} if step is None else {})


def grid(args: Any, folder: str) -> list[dict[str, Any]]:
    images, test = (1000, 500) if args.quick else (50000 if args.long else IMAGES, None)
    lossy, ways = (list(LOSSY)[:1], list(WAYS)[:2]) if args.quick else (LOSSY, WAYS | MORE if args.long else WAYS)
    points = [(one, way, seed) for one in lossy for way in ways for seed in range(3 if args.long else 1)]
    return [
        {"lossy": one, "way": way, "seed": seed, "folder": folder, "images": images, "test": test}
        for one, way, seed in points
    ]


def rows(cells: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[Row]:
    """Accuracy of every way beside that without recovery, and its seconds."""
    points: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one, run in zip(cells, runs, strict=True):
        points.setdefault((one["lossy"], one["way"]), []).append(run)
    found: list[Row] = []
    for (lossy, way), several in points.items():
        value, seconds = (round(statistics.mean(run[k] for run in several), 2) for k in ("accuracy", "seconds"))
        before = round(statistics.mean(run["accuracy"] for run in points[lossy, "nothing"]), 2)
        if way == "nothing":
            found.append(Row(f"{lossy}: {way}", value, "%", "original", round(several[0]["original"], 2)))
            continue
        found.append(Row(f"{lossy}: {way}", value, "%", "nothing", before, "more than nothing"))
        found.append(Row(f"{lossy}: {way}, time", seconds, "s"))
    return found


def main() -> int:
    args = arguments(__doc__ or "")
    folder = _cifar.root()
    if folder is None:
        return 4
    print(conditions())
    cells = grid(args, str(folder))
    seconds = 8 if args.quick else 45 * (5 if args.long else 1)
    runs = run_cells("recover", cell, cells, jobs=args.jobs, fresh=args.fresh, seconds=seconds)
    finish(rows(cells, runs), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
