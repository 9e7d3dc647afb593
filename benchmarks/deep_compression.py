"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST, per stage as in Han et al. 2016, table 1, and beyond it.

    SMELT_DATA=... python benchmarks/deep_compression.py

The paper's chain (`recipes/deep-compression.yaml`) trains, prunes, shares and codes with nothing but MNIST.  Beyond
(`recipes/lenet-300-100.yaml`, `recipes/lenet-5.yaml`) the student follows two small convolutional teachers on
augmented images; the teachers' outputs are recorded once.  Every size is that of the written file, everything in it
counted, over the plain fp32 bytes of the parameters; every error is that of the file, loaded again, on the 10,000 test
images.  Epochs are selected on 5,000 held-out training images, or not at all.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import _mnist
import torch
from _bench import HERE, Row, arguments, conditions, data_folder, finish, run_cells
from safetensors.torch import load_file

import smelt

RECIPES = HERE.parent / "recipes"
SEEDS = range(5)
TEACHERS, TEACHER_EPOCHS, COPIES, STRENGTH = 2, 10, 10, 0.5

# network -> its builder; epochs, rate and batch of the baseline; the paper's error and ratio; what goes beyond
NETWORKS: dict[str, dict[str, Any]] = {
    "LeNet-300-100": {
        "builder": "lenet300",
        "baseline": {"epochs": 25, "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.05},
        "batch": 128,
        "paper": (1.64, 1.58, 40),
        "beyond": ("lenet-300-100.yaml", 100, 1.64, "124x at 1.9 %"),
        "seconds": (75, 130),
    },
    "LeNet-5": {
        "builder": "lenet",
        "baseline": {"epochs": 8, "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.05},
        "batch": 128,
        "paper": (0.80, 0.74, 39),
        "beyond": ("lenet-5.yaml", 200, 0.80, "555x at 0.69 %"),
        "seconds": (300, 400),
    },
}


class Copies:
    """Augmented copies of the training images with the recorded outputs of the teachers; one copy an epoch."""

    def __init__(self, files: Sequence[str], keep: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int):
        stored = [load_file(name) for name in files]
        self.copies = [(s["x"][keep], s["logits"][keep]) for s in stored]
        self.labels, self.batch_size, self.seed, self.epoch = labels, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[smelt.Guided]:
        x, logits = self.copies[self.epoch % len(self.copies)]
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed * 1000 + self.epoch))
        for index in order[: len(self) * self.batch_size].split(self.batch_size):
            yield smelt.Guided(x[index].float() / 255, self.labels[index], logits[index].float())


def build(network: str, seed: int) -> smelt.Source:
    builder = NETWORKS[network]["builder"]
    torch.manual_seed(seed)
    model, _, given = smelt.open_model(builder)
    return smelt.Source.of(model, builder, given)


def job(data: smelt.Data, seed: int) -> smelt.Job:
    return smelt.Job(data=data, seed=seed, latency=False)


def stages(result: smelt.Result) -> list[dict[str, Any]]:
    """[{after, file, error}] of one run, and that the saved file is what was measured."""
    found = [
        {"after": name, "file": result.report.value("file", i), "error": 100 - result.report.value("accuracy", i)}
        for i, name in result.report.steps()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.smelt"
        if not result.save(path) == found[-1]["file"] == path.stat().st_size:
            raise SystemExit(f"{path.stat().st_size} bytes on disk, {found[-1]['file']} in the report")
    return found


def paper(network: str, folder: str, seed: int, epochs: int | None = None, images: int | None = None) -> Any:
    """The baseline, then the paper's chain."""
    torch.set_num_threads(1)
    spec = NETWORKS[network]
    data = _mnist.data(Path(folder), seed, spec["batch"], images)
    source = build(network, seed)
    settings = spec["baseline"] | ({"epochs": epochs} if epochs else {})
    baseline = smelt.compress(source, {"steps": [{"train": settings}]}, job(data, seed))
    recipe = smelt.Recipe.of(RECIPES / "deep-compression.yaml").to_plain()
    if epochs:
        for step in recipe["steps"]:
            if "train" in step:
                step["train"]["epochs"] = epochs
    source = smelt.Source.of(baseline.model, source.builder, source.arguments)
    return stages(smelt.compress(source, recipe, job(data, seed)))


def beyond(network: str, folder: str, files: list[str], seed: int) -> Any:
    """A student of the teachers, pruned while it learns."""
    torch.set_num_threads(1)
    spec = NETWORKS[network]
    plain = _mnist.data(Path(folder), 0, spec["batch"])
    _, labels = _mnist.read(Path(folder), "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rest = order[_mnist.HELD_OUT :]
    copies = Copies(files, rest, labels[rest], spec["batch"], seed)
    data = smelt.Data(copies, plain.valid, plain.test, name="MNIST, augmented")
    return stages(smelt.compress(build(network, seed), RECIPES / spec["beyond"][0], job(data, seed)))


def copies_of(folder: str, jobs: int) -> list[str]:
    """Train the teachers and record their outputs, or take the files of an earlier run."""
    specs = [(s, TEACHER_EPOCHS, None) for s in range(TEACHERS)]
    paths = [str(_mnist.teacher_path(*spec)) for spec in specs]
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        missing = [spec for spec, path in zip(specs, paths, strict=True) if not Path(path).exists()]
        if missing:
            print(f"training {len(missing)} teachers, about 4 min")
            for error in pool.map(_mnist.train_teacher, [folder] * len(missing), *zip(*missing, strict=True)):
                print(f"  a teacher's error on held-out images: {error:.2f} %", flush=True)
        print(f"recording {COPIES} augmented copies, about 1 min")
        n = range(COPIES)
        return list(pool.map(_mnist.record, [folder] * COPIES, n, [STRENGTH] * COPIES, [paths] * COPIES))


def rows(network: str, label: str, runs: list[Any], target: str, peer: str, peer_ratio: float) -> list[Row]:
    """Mean over seeds per stage; the last stage against its target."""
    dense = sum(t.numel() for t in build(network, 0).module.parameters()) * 4  # type: ignore[union-attr]
    found = []
    for i, stage in enumerate(runs[0]):
        size = statistics.mean(run[i]["file"] for run in runs)
        errors = [run[i]["error"] for run in runs]
        name = f"{network}, {label}, {i}: {stage['after']}"
        last = i == len(runs[0]) - 1
        shown = dense / size if i else 1.0
        note = (peer, peer_ratio, target) if last else (None, None, None)
        found.append(Row(f"{name}, ratio", round(shown, 1), "x", *note))
        found.append(Row(f"{name}, file", round(size), "bytes"))
        spread = f"% +- {statistics.pstdev(errors):.2f}"
        found.append(Row(f"{name}, test error", round(statistics.mean(errors), 3), spread))
    return found


def quick(folder: str, jobs: int) -> list[Row]:
    """Small versions of the same chains: one epoch each on 6,000 images, one seed; no targets."""
    found = []
    for network in NETWORKS:
        run = paper(network, folder, 0, 1, 6000)
        found += rows(network, "quick", [run], "", "", 0.0)
    return found


def full(folder: str, jobs: int, fresh: bool, networks: Sequence[str]) -> list[Row]:
    found: list[Row] = []
    minutes = 6 + sum(sum(NETWORKS[n]["seconds"]) * len(SEEDS) / jobs / 60 for n in networks)
    print(f"about {minutes:.0f} min on two idle cores if nothing is kept from an earlier run")
    files = copies_of(folder, jobs)
    for network in networks:
        spec = NETWORKS[network]
        (base, error, ratio), (_, further, limit, record) = spec["paper"], spec["beyond"]
        first, second = spec["seconds"]
        share: dict[str, Any] = {"jobs": jobs, "fresh": fresh}
        cells = [{"network": network, "folder": folder, "seed": seed} for seed in SEEDS]
        runs = run_cells("deep_compression", paper, cells, seconds=first, **share)
        target = f">= {ratio}x at <= {error} % (baseline <= {base} %)"
        found += rows(network, "the paper's chain", runs, target, "Han et al. 2016", ratio)
        runs = run_cells("deep_compression", beyond, [c | {"files": files} for c in cells], seconds=second, **share)
        target = f">= {further}x at <= {limit} %; record {record}"
        found += rows(network, "beyond", runs, target, "Han et al. 2016", ratio)
    return found


def main() -> int:
    args = arguments(__doc__ or "")
    folder = data_folder("mnist")
    if folder is None:
        return 4
    print(conditions())
    made = quick(str(folder), args.jobs) if args.quick else full(str(folder), args.jobs, args.fresh, list(NETWORKS))
    finish(made, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
