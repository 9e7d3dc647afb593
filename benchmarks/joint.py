"""Channels, then sparse weights of few bits under distillation, then coding: one chain, for networks on CIFAR-10.

    SMELT_DATA=... python benchmarks/joint.py

    prune.channels      the channels that count least go
    train               an epoch for what is left, with the outputs of the network before as a guide
    train               at once: the same guide, weights set to 0 (a ramp), the rest of few bits (learned scales)
    quantize.affine     vectors (of batch norms, biases), 8 bits

then coding: every file is entropy-coded, and `packed` is the last one with its bits packed and no more.

Three strengths.  Every size is that of the written file, everything in it counted, against the fp32 checkpoint of the
network before (`x`); every error is that of the file, loaded again, on the 10,000 test images.  That batch norms stay
was chosen on held-out training images, in runs of 50 steps of ResNet-20, and there, too, after one epoch of each step
of `middle`, the rate (1e-3, better than 3e-3); the network before had seen these images.  The strengths are
guesses.  Nothing is selected after the last epoch. `trained as long` is the network before, guided and trained for as
many epochs.

VGG-16 with batch norm is trained here first.  It is used where torch finds a GPU, and with --long; elsewhere it is the
much smaller ResNet-20 (272,474 parameters against 14,728,266), whose ratios do not compare with those published for
VGG-16: 159x at 6.57 % and 590x at 10.0 % error, on exact pixels.  The images here are JPEGs, on which either network
has been trained.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _cifar
import torch
from _bench import CACHE, Row

import smelt
from smelt.core.data import fingerprint
from smelt.methods.code.bits import Bits

STATES = CACHE / "joint-states"
BATCH = 128
HELD = 5000  # of the images to train on, the last: what settings were chosen on
LOOP = {"precision": "bfloat16", "hold_out": 0.0, "keep": "last"}
TEACH = {"distill.logits": {"temperature": 4.0, "alpha": 0.3}}
BASE = LOOP | {"optimizer": "sgd", "weight_decay": 5e-4}
LEARNED = {"range": "lsq", "scales": "bfloat16", "learn": True}
VGG = {"depth": 16, "norm": True, "pool": 1, "hidden": [], "classes": 10}

# network -> epochs of the network itself, of the cut one, of the joint step; the latter's rate; the layers that keep 8
# bits; published; strengths: share of the parameters cut as channels, zeros, bits; seconds of an epoch on one core
NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet-20": {
        "epochs": (0, 1, 3),
        "long": (0, 2, 20),
        "lr": 1e-3,
        "edges": ["conv1", "linear"],
        "published": {},
        "strengths": {"mild": (0.15, 0.5, 4), "middle": (0.3, 0.7, 3), "strong": (0.4, 0.85, 2)},
        "seconds": 36,
    },
    "VGG-16": {
        "epochs": (60, 3, 30),
        "long": (60, 3, 30),
        "lr": 1e-3,
        "edges": ["features.0", "classifier.0"],
        "published": {"mild": (159, "at no loss (6.57 %)"), "strong": (590, "at 10.0 %")},
        "strengths": {"mild": (0.6, 0.95, 4), "middle": (0.7, 0.96, 4), "strong": (0.8, 0.97, 3)},
        "seconds": 280,
    },
}
LONGER = "trained as long"


def chain(name: str, strength: str, epochs: tuple[int, int], vectors: list[str]) -> list[Any]:
    spec = NETWORKS[name]
    if strength == LONGER:
        return [{"train": BASE | {"epochs": sum(epochs), "lr": 0.02, "with": [TEACH]}}]
    (cut, zeros, bits), edges = spec["strengths"][strength], spec["edges"]
    inner = ["*", *(f"!{path}" for path in edges)]
    together = [
        TEACH,
        {"prune.weights": {"ratio": {"ramp": [0.0, zeros]}, "scope": "global", "on": inner}},
        {"quantize.affine": LEARNED | {"bits": 8, "on": edges}},
        {"quantize.affine": LEARNED | {"bits": bits, "on": inner}},
    ]
    return [
        {"prune.channels": {"ratio": cut, "of": "parameters"}},
        {"train": BASE | {"epochs": epochs[0], "lr": 0.02, "with": [TEACH]}},
        {"train": LOOP | {"epochs": epochs[1], "lr": spec["lr"], "warmup": 0.05, "clip": 1.0, "with": together}},
        {"quantize.affine": {"bits": 8, "per": "tensor", "symmetric": False, "on": vectors}},
    ]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def job(data: smelt.Data, seed: int) -> smelt.Job:
    return smelt.Job(data=data, seed=seed, latency=False, device=device())


def images(folder: Path, seed: int, count: int | None, test: int | None, held: bool) -> smelt.Data:
    """The images to train and to test on; the latter from the held-out ones, with `held`."""
    x, y = _cifar.read(folder, "train", CACHE)
    last = len(x) - HELD if held else len(x)
    count = min(last, count or last)
    train = smelt.Batches(_cifar.scaled(x[:count]), y[:count], BATCH, True, seed, _cifar.moved)
    if held:
        x, y = x[last:], y[last:]
    else:
        x, y = _cifar.read(folder, "test", CACHE)
    splits = {"train": train, "test": smelt.Batches(_cifar.scaled(x[:test]), y[:test], 500)}
    return smelt.Data(**splits, name="CIFAR-10 as JPEG", fingerprint=fingerprint(splits))


def network(name: str, folder: Path) -> smelt.Source:
    """The trained network; VGG-16 is trained once, which takes minutes on a GPU and hours elsewhere."""
    if name == "ResNet-20":
        return smelt.Source.of(_cifar.network(name, folder), "_cifar:build", {"blocks": _cifar.DEPTH[name]})
    epochs = NETWORKS[name]["epochs"][0]
    torch.manual_seed(0)
    model, builder, given = smelt.open_model("vgg", arguments=VGG)
    kept = STATES / f"{name}-{epochs}.pt"
    if not kept.exists():
        STATES.mkdir(parents=True, exist_ok=True)
        print(f"training {name} first, {epochs} epochs on {device()}", flush=True)
        step = {"train": BASE | {"epochs": epochs, "lr": 0.05, "warmup": 0.05}}
        trained = smelt.compress(model, {"steps": [step]}, job(images(folder, 0, None, None, False), 0)).model
        part = kept.with_suffix(f".{os.getpid()}")
        torch.save(trained.cpu().state_dict(), part)
        part.replace(kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return smelt.Source.of(model.eval(), builder, given)


def cell(
    name: str,
    strength: str,
    epochs: tuple[int, int],
    seed: int,
    folder: str,
    count: int | None,
    test: int | None,
    held: bool = False,
) -> Any:
    """One chain: [{after, file, error}] per stage, and its seconds."""
    torch.set_num_threads(1)
    path = Path(folder)
    source, given = network(name, path), job(images(path, seed, count, test, held), seed)
    start = time.perf_counter()
    assert source.module is not None
    vectors = [path for path, p in source.module.named_parameters() if p.dim() == 1]
    result = smelt.compress(source, {"steps": chain(name, strength, epochs, vectors)}, given)
    report, took = result.report, time.perf_counter() - start
    found = [
        {"after": after, "file": report.value("file", i), "error": 100 - report.value("accuracy", i)}
        for i, after in report.steps()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "model.smelt"
        if not result.save(written) == found[-1]["file"] == written.stat().st_size:
            raise SystemExit(f"{written.stat().st_size} bytes on disk, {found[-1]['file']} in the report")
        packed = smelt.save(result.model, Path(scratch) / "packed.smelt", tail=[Bits()])
    return {"stages": found, "packed": packed, "seconds": took}


def grid(args: Any, folder: Path) -> list[dict[str, Any]]:
    names = ["ResNet-20", "VGG-16"] if args.long else ["VGG-16"] if device() == "cuda" else ["ResNet-20"]
    names = ["ResNet-20"] if args.quick else names
    if names == ["ResNet-20"]:
        print("ResNet-20, not VGG-16: " + ("--quick" if args.quick else "no GPU is at hand, and no --long"))
    found = []
    for name in names:
        spec = NETWORKS[name]
        given = {"name": name, "seed": 0, "folder": str(folder), "count": None, "test": None}
        if args.quick:
            found.append({**given, "strength": "middle", "epochs": (1, 1), "count": 1000, "test": 500})
            continue
        epochs = spec["long" if args.long else "epochs"][1:]
        found += [{**given, "strength": one, "epochs": epochs} for one in (*spec["strengths"], LONGER)]
    return found


def estimate(cells: list[dict[str, Any]]) -> float:
    """Seconds of a cell, on average."""
    took = []
    for one in cells:
        first, second = one["epochs"]
        share = (one["count"] or 50000) / 50000
        factor = 1.3 if one["strength"] == LONGER else 2.0  # cut, but decoded from its leaves in each step
        beside = 60 if one["test"] is None else 25  # cutting, and measuring each stage
        took.append(beside + NETWORKS[one["name"]]["seconds"] * share * (first + factor * second))
    return sum(took) / len(took)


def rows(cells: list[dict[str, Any]], runs: list[Any]) -> list[Row]:
    found = []
    for one, run in zip(cells, runs, strict=True):
        name, strength, stages = one["name"], one["strength"], run["stages"]
        dense = stages[0]["file"]
        for i, stage in enumerate(stages):
            if strength == LONGER and i == 0:
                continue
            label = f"{name}, {strength}" if strength == LONGER else f"{name}, {strength}, {i}: {stage['after']}"
            ratio = Row(f"{label}, ratio", round(dense / stage["file"], 1), "x")
            error = Row(f"{label}, test error", round(stage["error"], 2), "%")
            if i == len(stages) - 1 and strength in NETWORKS[name]["published"]:
                value, when = NETWORKS[name]["published"][strength]
                ratio.peer, ratio.peer_value, ratio.target = "published", value, f">= {value}x {when}"
            found += [Row(f"{label}, file", stage["file"], "bytes"), ratio, error]
        if strength != LONGER:
            found.append(Row(f"{name}, {strength}, packed, file", run["packed"], "bytes"))
        found.append(Row(f"{name}, {strength}, time", round(run["seconds"] / 60, 1), "min"))
    return found


def main() -> int:
    return _cifar.run("joint", __doc__ or "", grid, cell, rows, estimate, network)


if __name__ == "__main__":
    sys.exit(main())
