"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST, per stage as in Han et al. 2016, table 1, and beyond it.

    SMELT_DATA=... python benchmarks/deep_compression.py

The paper's chain is `recipes/deep-compression.yaml`: prune, share, code.  Beyond it (`recipes/lenet-300-100.yaml`,
`recipes/lenet-5.yaml`) the same acts go further, and the uncompressed network is the teacher of the compressed one.
Every size is that of the written file, everything in it counted, against the plain fp32 bytes of the parameters; every
error is that of the file, loaded again, on the 10,000 test images after the last epoch: no epoch was selected on them.
Training images are shifted by up to one pixel; 5,000 of them are held out.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _mnist
import torch
from _bench import CACHE, HERE, Row, arguments, conditions, data_folder, finish, run_cells

import smelt

RECIPES = HERE.parent / "recipes"
STATES = CACHE / "deep_compression-states"  # so that chains share their baseline, and resume
SEEDS = range(5)
BATCH = 128

# network -> builder; its training; the paper's error before and after, and ratio; the recipe beyond, its ratio and
# error, the record; seconds of the two chains on one idle core
NETWORKS: dict[str, dict[str, Any]] = {
    "LeNet-5": {
        "builder": "lenet",
        "train": {"epochs": 8, "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.02},
        "paper": (0.80, 0.74, 39),
        "beyond": ("lenet-5.yaml", 200, 0.80, "555x at 0.69 %"),
        "seconds": (300, 480),
    },
    "LeNet-300-100": {
        "builder": "lenet300",
        "train": {"epochs": 25, "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.05},
        "paper": (1.64, 1.58, 40),
        "beyond": ("lenet-300-100.yaml", 100, 1.64, "124x at 1.9 %"),
        "seconds": (90, 130),
    },
}


def baseline(network: str, data: smelt.Data, seed: int, epochs: int | None = None) -> smelt.Source:
    """The trained network of a seed, from the cache where it was trained before."""
    spec = NETWORKS[network]
    torch.manual_seed(seed)
    model, builder, given = smelt.open_model(spec["builder"])
    settings = spec["train"] | {"keep": "last", "precision": "bfloat16"} | ({"epochs": epochs} if epochs else {})
    trained = smelt.compress(model, {"steps": [{"train": settings}]}, job(data, seed)).model
    return smelt.Source.of(trained, builder, given)


def job(data: smelt.Data, seed: int) -> smelt.Job:
    return smelt.Job(data=data, seed=seed, latency=False, cache=STATES)


def chain(
    network: str, recipe: dict[str, Any], folder: str, seed: int, epochs: int | None = None, images: int | None = None
) -> Any:
    """Baseline and one chain; [{after, file, error}] per stage."""
    torch.set_num_threads(1)
    data = _mnist.data(Path(folder), seed, BATCH, images)
    source = baseline(network, data, seed, epochs)
    result = smelt.compress(source, recipe, job(data, seed))
    report = result.report
    found = [
        {"after": after, "file": report.value("file", i), "error": 100 - report.value("accuracy", i)}
        for i, after in report.steps()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.smelt"
        if not result.save(path) == found[-1]["file"] == path.stat().st_size:
            raise SystemExit(f"{path.stat().st_size} bytes on disk, {found[-1]['file']} in the report")
    return found


def rows(network: str, label: str, runs: list[Any], peer: tuple[str, float] | None, target: str | None) -> list[Row]:
    """Mean over seeds per stage; the last stage stands against the peer and the target."""
    model, *_ = smelt.open_model(NETWORKS[network]["builder"])
    dense = 4 * sum(p.numel() for p in model.parameters())
    found = []
    for i, stage in enumerate(runs[0]):
        size = statistics.mean(run[i]["file"] for run in runs)
        errors = [run[i]["error"] for run in runs]
        name = f"{network}, {label}, {i}: {stage['after']}"
        last = peer is not None and i == len(runs[0]) - 1
        ratio = Row(f"{name}, ratio", round(dense / size, 1), "x")
        if last and peer is not None:
            ratio.peer, ratio.peer_value, ratio.target = peer[0], peer[1], target
        spread = f"% +- {statistics.pstdev(errors):.2f}"
        found += [Row(f"{name}, file", round(size), "bytes"), ratio]
        found.append(Row(f"{name}, test error", round(statistics.mean(errors), 3), spread))
    return found


def quick(folder: str) -> list[Row]:
    """The paper's chain in small: one epoch each on 6,000 images, one seed; no targets."""
    recipe = plain("deep-compression.yaml")
    for step in recipe["steps"]:
        if "train" in step:
            step["train"]["epochs"] = 1
    found = []
    for network in NETWORKS:
        found += rows(network, "quick", [chain(network, recipe, folder, 0, 1, 6000)], None, None)
    return found


def plain(recipe: str) -> dict[str, Any]:
    """A recipe as data: what a cell depends on."""
    return smelt.Recipe.of(RECIPES / recipe).to_plain()


def full(folder: str, jobs: int, fresh: bool, seeds: Sequence[int]) -> list[Row]:
    minutes = sum(sum(spec["seconds"]) for spec in NETWORKS.values()) * len(seeds) / jobs / 60
    print(f"about {minutes:.0f} min on {jobs} idle cores if nothing is kept from an earlier run")
    found: list[Row] = []
    for network, spec in NETWORKS.items():
        (base, error, ratio), (name, further, limit, record) = spec["paper"], spec["beyond"]
        chains = [
            ("the paper's chain", "deep-compression.yaml", f">= {ratio}x at <= {error} %, baseline <= {base} %"),
            ("beyond", name, f">= {further}x at <= {limit} %; record {record}"),
        ]
        for (label, recipe, target), seconds in zip(chains, spec["seconds"], strict=True):
            cells = [{"network": network, "recipe": plain(recipe), "folder": folder, "seed": s} for s in seeds]
            runs = run_cells(f"{network}, {label}", chain, cells, jobs=jobs, fresh=fresh, seconds=seconds)
            found += rows(network, label, runs, ("Han et al. 2016", ratio), target)
    return found


def main() -> int:
    args = arguments(__doc__ or "")
    folder = data_folder("mnist")
    if folder is None:
        return 4
    print(conditions())
    if args.fresh:
        shutil.rmtree(STATES, ignore_errors=True)
    finish(quick(str(folder)) if args.quick else full(str(folder), args.jobs, args.fresh, SEEDS), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
