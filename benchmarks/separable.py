"""Trained ResNets on CIFAR-10 made separable: what is lost before and after distillation, and what the start is worth.

    SMELT_DATA=... python benchmarks/separable.py

Every 3 x 3 convolution but the first becomes depthwise and pointwise ones (`swap.separable`, fitted to the outputs of
the layers on 1,024 training images without labels), and the whole is trained with distillation from the network that
it was.  Accuracy is taken on the 10,000 test images, of the written file, loaded again.  Peers in the same run: the
singular vectors of the kernels alone, before training; with --long, which has the other forms too, the same new
network from random weights, with the same distillation for as long, at a higher rate.  The images are JPEGs, on which
the networks, trained on exact pixels, have been trained further.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import _cifar
import torch
from _bench import CACHE, Row
from prune_cifar import accuracy, network, speed
from torch import nn

import smelt
from smelt.core.data import Batches
from smelt.measures.bytes import checkpoint_bytes
from smelt.measures.macs import macs

BATCH = 128
FITTED = 1024  # images, without labels, that layers are fitted on
LATENCY_BATCH = 64
INNER = ["*", "!conv1", "!linear"]
BOTH, ONE, GROUPS = "1x1, depthwise, 1x1", "depthwise, 1x1", "8 groups, 1x1"
FORMS: dict[str, dict[str, Any]] = {
    BOTH: {"swap.separable": {"order": "both", "ratio": 0.32, "round_to": 8, "between": "norm", "on": INNER}},
    ONE: {"swap.separable": {"order": "depthwise", "between": "norm", "on": INNER}},
    GROUPS: {"swap.grouped": {"groups": 8, "pointwise": True, "on": INNER}},
}
TRAIN = {"optimizer": "sgd", "weight_decay": 5e-4, "warmup": 0.1, "precision": "bfloat16", "keep": "last"}
RATES = {
    "ours": 0.01,
    "scratch": 0.1,
}  # chosen from 0.004 to 0.1 on training images; the usual
TEACH = {"distill.logits": {"temperature": 4.0, "alpha": 0.3}}
MOST_LOST = {BOTH: 1.0}  # points, after training


def cell(
    name: str, form: str, way: str, seed: int, folder: str, images: int, epochs: int, test: int | None
) -> dict[str, Any]:
    """One network made separable in one way, before and after `epochs` over `images` images: accuracy, bytes, speed."""
    torch.set_num_threads(1)
    path = Path(folder)
    data = _cifar.data(path, CACHE, seed, images, test, BATCH)
    known = _cifar.data(path, CACHE, seed, FITTED, 1, BATCH, None).train
    assert isinstance(data.test, Batches) and isinstance(known, Batches)
    teacher = network(name, path)
    if way == "uncut":
        return {"after": accuracy(teacher, data.test), "bytes": checkpoint_bytes(teacher)}
    ((method, settings),) = FORMS[form].items()
    if way in ("plain", "scratch"):
        settings = settings | {"weighted": False, "turns": 0}
    job = smelt.Job(data=smelt.Data(train=known), seed=seed, latency=False)
    made = smelt.compress(teacher, {"steps": [{method: settings}]}, job).model
    if way == "scratch":
        torch.manual_seed(seed)
        for module in made.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()
    found: dict[str, Any] = {"before": accuracy(made, data.test)}
    if way == "plain":
        return found
    job = smelt.Job(data=smelt.Data(train=data.train), teacher=teacher, seed=seed, latency=False)
    step = {"train": TRAIN | {"lr": RATES[way], "epochs": epochs, "with": [TEACH]}}
    source = smelt.Source.of(made, "_cifar:build", {"blocks": _cifar.DEPTH[name]})
    after = smelt.compress(source, {"steps": [step]}, job).model
    with tempfile.TemporaryDirectory() as scratch:
        found["bytes"] = smelt.save(after, Path(scratch) / "model.smelt")
        loaded = smelt.load(Path(scratch) / "model.smelt", into=_cifar.build(_cifar.DEPTH[name])).eval()
    found["after"] = accuracy(loaded, data.test)
    found["fewer"] = macs(teacher, known.inputs[:1]) / macs(loaded, known.inputs[:1])
    found["speed"] = speed(teacher, loaded, known.inputs[:LATENCY_BATCH])
    return found


def estimate(cells: list[dict[str, Any]]) -> float:
    """Seconds of a cell, on average."""
    took = []
    for one in cells:
        learning = one["images"] * one["epochs"] * 0.0016 if one["way"] in ("ours", "scratch") else 0
        took.append((learning + (5 if one["test"] else 30)) * (1 if one["name"] == "ResNet-20" else 3))
    return sum(took) / len(took)


def grid(args: Any, folder: Path) -> list[dict[str, Any]]:
    def cells(name: str, forms: Any, ways: Any, images: int, epochs: int, seeds: Any = (0,)) -> list[dict[str, Any]]:
        given = {"name": name, "folder": str(folder), "test": 1000 if args.quick else None}
        points = [(f, w, s) for f in forms for w in ways for s in seeds]
        return [given | {"form": f, "way": w, "seed": s, "images": images, "epochs": epochs} for f, w, s in points]

    if args.quick:
        return cells("ResNet-20", [""], ["uncut"], 1, 0) + cells("ResNet-20", [ONE], ["plain", "ours"], 640, 1)
    found: list[dict[str, Any]] = []
    seeds = range(3 if args.long else 1)
    for name in _cifar.WEIGHTS if args.long else ["ResNet-20"]:
        forms, ways, epochs = (list(FORMS), ["ours", "scratch"], 30) if args.long else ([BOTH], ["ours"], 12)
        found += cells(name, forms, ways, 50000, epochs, seeds)
        found += cells(name, [""], ["uncut"], 1, 0) + cells(name, forms, ["plain"], 1, 0)
    return found


def rows(cells: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[Row]:
    points: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one, run in zip(cells, runs, strict=True):
        points.setdefault((one["name"], one["form"], one["way"]), []).append(run)

    def mean(key: tuple[str, str, str], what: str) -> float | None:
        return round(statistics.mean(run[what] for run in points[key]), 2) if key in points else None

    found = []
    for name, _, way in points:
        if way == "uncut":
            found.append(Row(f"{name}, as it was, accuracy", mean((name, "", way), "after"), "%"))
    for key in points:
        name, form, way = key
        if way != "ours":
            continue
        label, whole = f"{name}, {form}", mean((name, "", "uncut"), "after")
        dense = points[name, "", "uncut"][0]["bytes"]
        fewer = ">= 3" if form in MOST_LOST else None
        found.append(Row(f"{label}, fewer MACs", mean(key, "fewer"), "x", target=fewer))
        plain = mean((name, form, "plain"), "before")
        peer = None if plain is None else "singular vectors of the kernels"
        found.append(Row(f"{label}, before training", mean(key, "before"), "%", peer, plain))
        scratch = mean((name, form, "scratch"), "after")
        peer = None if scratch is None else "from random weights"
        least = f">= {whole - MOST_LOST[form]:.2f}" if whole is not None and form in MOST_LOST else None
        found.append(Row(f"{label}, after training", mean(key, "after"), "%", peer, scratch, least))
        if len(points[key]) > 1:
            spread = statistics.stdev(run["after"] for run in points[key])
            found.append(Row(f"{label}, standard deviation over seeds", round(spread, 2), "points"))
        found.append(Row(f"{label}, file", mean(key, "bytes"), "bytes", "fp32 checkpoint", dense))
        for kind in points[key][0]["speed"]:
            times = statistics.mean(run["speed"][kind] for run in points[key])
            found.append(Row(f"{label}, faster, {kind}", round(times, 2), "x"))
    return found


def main() -> int:
    return _cifar.run("separable", __doc__ or "", grid, cell, rows, estimate, network)


if __name__ == "__main__":
    sys.exit(main())
