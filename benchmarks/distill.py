"""A student taught by a trained ResNet-56 on CIFAR-10, and one on scikit-learn's digits: ways of distillation.

    SMELT_DATA=... python benchmarks/distill.py

Each student starts from random weights and sees the same images the same number of times, by the same `train` step;
only what stands under `with` differs.  The images are JPEGs, on which the teacher has been trained further, and an
epoch has 10,000 of them (50,000 with --long), so that students are far from what they could become: what is measured
is what a teacher is worth in a short training.  Accuracy is taken on the 10,000 test images; each way is compared with
the student alone of the same seed.  --long adds ResNet-8 and a MobileNetV2, the other features, and students cut from
the teacher instead of random ones.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _cifar
import torch
from _bench import CACHE, Row, arguments, conditions, finish, run_cells
from prune_cifar import accuracy, network
from torch import nn

import smelt
from smelt.core.data import Batches
from smelt.measures.parameters import parameters

EPOCHS, IMAGES, BATCH = 5, 10000, 128
TRAIN = {
    "lr": 0.1,
    "optimizer": "sgd",
    "weight_decay": 5e-4,
    "schedule": "one-cycle",
    "precision": "bfloat16",
    "keep": "last",
}
KD = {"distill.logits": {}}
DECOUPLED = {"distill.logits": {"kind": "decoupled", "others": 2.0}}
STANDARD = {"distill.logits": {"standardize": True}}
# digits: the best of five on training images that were held out, though no better there than the student alone
SOFT = {"CIFAR-10": {"temperature": 4.0, "alpha": 0.1}, "digits": {"temperature": 2.0, "alpha": 0.5}}
ATTENTION = {"distill.features": {"kind": "attention", "strength": 1.0}}
HINT = {"distill.features": {"kind": "hint", "strength": 1.0}}
WAYS: dict[str, list[dict[str, Any]]] = {
    "alone": [],
    "KD": [KD],
    "DKD": [DECOUPLED],
    "attention": [ATTENTION],
    "KD + attention": [KD, ATTENTION],
}
MORE: dict[str, list[dict[str, Any]]] = {
    "KD, standardized": [STANDARD],
    "hint": [HINT],
    "relational": [{"distill.features": {"kind": "relational", "strength": 1.0}}],
    "similarity": [{"distill.features": {"kind": "similarity", "strength": 1000.0}}],
    "DKD + attention": [DECOUPLED, ATTENTION],
}
# A student that is the teacher with a part of it gone, in one line of a recipe.
CUT = {
    "ResNet-56, half the blocks": {"prune.layers": {"ratio": 0.5}},
    "ResNet-56, half the channels": {"prune.channels": {"ratio": 0.5, "scope": "local"}},
}
SECONDS = {"CIFAR-10": 110, "digits": 18}  # of a cell


def mobilenet() -> nn.Module:
    arguments = {"width": 0.5, "classes": 10, "stem_stride": 1, "strides": (1, 1, 2, 2, 1, 2, 1), "dropout": 0.0}
    return smelt.open_model("mobilenet_v2", arguments=arguments)[0]


def small_digits() -> nn.Module:
    return smelt.open_model("resnet_digits", arguments={"channels": (6, 8), "blocks": (1, 1)})[0]


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: _cifar.ResNet(3),
    "ResNet-8": lambda: _cifar.ResNet(1),
    "MobileNetV2 0.5x": mobilenet,
    "small": small_digits,
}


def digits_teacher() -> nn.Module:
    """ResNet of 315,114 weights, trained in about 20 s, once."""
    kept = CACHE / "distill-digits.pt"
    model = smelt.open_model("resnet_digits")[0]
    if not kept.exists():
        torch.manual_seed(0)
        model = smelt.open_model("resnet_digits")[0]
        steps = [{"train": {"epochs": 12, "lr": 3e-3, "optimizer": "adamw", "keep": "last"}}]
        state = smelt.compress(model, steps, job(smelt.open_data("digits"), None, 0)).model.state_dict()
        part = kept.with_suffix(".part")
        torch.save(state, part)
        part.replace(kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


def job(data: smelt.Data, teacher: nn.Module | None, seed: int) -> smelt.Job:
    return smelt.Job(data=smelt.Data(train=data.train), teacher=teacher, seed=seed, latency=False)


def cell(data: str, student: str, way: str, seed: int, folder: str, epochs: int, images: int, test: int | None) -> Any:
    """One student, taught in one way: percent right on the test images, and how large it is."""
    torch.set_num_threads(1)
    path = Path(folder)
    if data == "digits":
        teacher, given = digits_teacher(), smelt.open_data("digits", None, seed)
        train: dict[str, Any] = {"epochs": 8 * epochs, "lr": 3e-3, "optimizer": "adamw", "keep": "last"}
    else:
        teacher, given = network("ResNet-56", path), _cifar.data(path, CACHE, seed, images, test, BATCH)
        train = TRAIN | {"epochs": epochs}
    assert isinstance(given.test, Batches)
    pieces = [
        {n: SOFT[data] | found if n == "distill.logits" else found}
        for p in (WAYS | MORE)[way]
        for n, found in p.items()
    ]
    steps: list[Any] = [{"train": train | {"hold_out": 0, "with": pieces}}]
    if student in CUT:
        model, steps = teacher, [CUT[student], *steps]
    else:
        torch.manual_seed(seed)
        model = STUDENTS[student]()
    taught = smelt.compress(model, {"steps": steps}, job(given, teacher, seed)).model
    found = {"accuracy": accuracy(taught, given.test), "parameters": parameters(taught)}
    if seed == 0 and way == "alone":
        found |= {"teacher": accuracy(teacher, given.test), "teacher's parameters": parameters(teacher)}
    return found


def grid(args: Any, folder: str) -> list[dict[str, Any]]:
    def cells(data: str, student: str, ways: Any, seeds: Any) -> list[dict[str, Any]]:
        epochs, images, test = (1, 512, 500) if args.quick else (EPOCHS, 50000 if args.long else IMAGES, None)
        size = {"folder": folder, "epochs": epochs, "images": images, "test": test}
        return [{"data": data, "student": student, "way": w, "seed": s, **size} for w in ways for s in seeds]

    if args.quick:
        found = cells("digits", "small", ("alone", "KD"), [0])
        return found + (cells("CIFAR-10", "ResNet-20", ("alone", "KD + attention"), [0]) if folder else [])
    seeds = range(3)
    found = cells("digits", "small", WAYS, seeds)
    if folder:
        found += cells("CIFAR-10", "ResNet-20", WAYS, seeds)
        if args.long:
            found += cells("CIFAR-10", "ResNet-20", MORE, seeds)
            for student in ("ResNet-8", "MobileNetV2 0.5x", *CUT):
                found += cells("CIFAR-10", student, WAYS, seeds)
    return found


def rows(cells: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[Row]:
    """Mean over seeds of every way, and what it is better than the student alone, seed by seed."""
    points: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for one, run in zip(cells, runs, strict=True):
        points.setdefault((one["data"], one["student"], one["way"]), {})[one["seed"]] = run
    found = []
    for (data, student, way), several in points.items():
        label = f"{data}, {student}"
        alone = points[data, student, "alone"]
        mean = statistics.mean(run["accuracy"] for run in several.values())
        if way == "alone":
            first = several[0]
            found.append(Row(f"{label}: teacher", round(first["teacher"], 2), "%"))
            found.append(Row(f"{label}: parameters", first["parameters"], "", "teacher", first["teacher's parameters"]))
        found.append(Row(f"{label}: {way}", round(mean, 2), "%", "alone", round(_mean(alone), 2)))
        if way != "alone":
            gains = [several[seed]["accuracy"] - alone[seed]["accuracy"] for seed in several]
            spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
            target = f"> 0; deviation over seeds {spread:.2f}"
            found.append(Row(f"{label}: {way}, gain", round(statistics.mean(gains), 2), "points", target=target))
    return found


def _mean(several: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(run["accuracy"] for run in several.values())


def main() -> int:
    args = arguments(__doc__ or "")
    folder = str(_cifar.root() or "")
    print(conditions())
    CACHE.mkdir(parents=True, exist_ok=True)
    digits_teacher()  # trained once, for all cells
    if folder:
        network("ResNet-56", Path(folder))
    cells = grid(args, folder)
    factor = (5 if args.long else 0.1 if args.quick else 1) / len(cells)
    seconds = factor * sum(SECONDS[one["data"]] for one in cells)
    runs = run_cells("distill", cell, cells, jobs=args.jobs, fresh=args.fresh, seconds=seconds)
    finish(rows(cells, runs), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
