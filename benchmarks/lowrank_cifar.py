"""ResNet-20 and a small VGG on CIFAR-10, factorized to 2x and 4x fewer MACs, against tensorly-torch.

    SMELT_DATA=... python benchmarks/lowrank_cifar.py

Every convolution but the first is split by one method, with the same share of its parameters left: the largest with
which the MACs of the whole network, counted by the same counter, are within the budget.  Then the network is trained by
the same loop on the same images, with the dense network as the teacher.  tensorly-torch's FactorizedConv is initialised
by its own decomposition of the same weights and chains its layers (implementation 'factorized').  Accuracy is taken on
test images, before and after training, ours of the written file loaded again; bytes are those of that file and of the
peer's state dict.  `guarded` splits only layers that get faster (keep: faster) and so may keep more MACs.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _cifar
import prune_cifar
import torch
from _bench import CACHE, Row, arguments, conditions, finish, run_cells
from torch import Tensor, nn

import smelt
from smelt.core.data import Batches, evaluating
from smelt.core.method import Known, make
from smelt.core.store import apply_edits
from smelt.core.target import select, targets
from smelt.measures.bytes import checkpoint_bytes
from smelt.measures.macs import macs
from smelt.measures.parameters import parameters

STATES = CACHE / "lowrank_cifar-states"
BATCH = 128
SCORED = 128  # images that the moments of inputs are taken from
TUNE, TEST = 4000, 2000
WIDTHS = ((32, 32), (64, 64), (128, 128))
VGG_IMAGES, VGG_EPOCHS = 40000, 2
FACTORS = (2, 4)
PROBES = 6  # shares that are tried to meet the budget
SPLIT = ["*", "!conv1", "!features.0", "!linear"]

INPUTS = {"weight": "inputs"}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd, channel": ("lowrank.svd", {}),
    "svd, spatial": ("lowrank.svd", {"scheme": "spatial"}),
    "svd, channel, whitened": ("lowrank.svd", INPUTS),
    "svd, spatial, whitened": ("lowrank.svd", {"scheme": "spatial", **INPUTS}),
    "tucker": ("lowrank.tucker", {}),
    "tucker, whitened": ("lowrank.tucker", INPUTS),
    "cp": ("lowrank.cp", {"kernel": "joint"}),
    "cp, whitened": ("lowrank.cp", {"kernel": "joint", **INPUTS}),
    "tensor train": ("lowrank.tensor_train", {}),
    "tensor train, whitened": ("lowrank.tensor_train", INPUTS),
}
FAST = {"keep": "faster"}
GUARDED = {
    f"{way}, guarded": (OURS[way][0], OURS[way][1] | FAST) for way in ("svd, spatial, whitened", "tucker, whitened")
}
PEERS = ("cp", "tucker", "tt")
MORE = {"cp, split": ("lowrank.cp", {}), "cp, split, whitened": ("lowrank.cp", INPUTS)}
WAYS = OURS | GUARDED | MORE


class VGG(nn.Module):
    """Pairs of 3 x 3 convolutions with batch norm, each pair halving the image; 39 million MACs."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for pair in WIDTHS:
            for width in pair:
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def network(name: str, folder: Path, quick: bool = False) -> nn.Module:
    """The trained network; the VGG is trained once, which takes minutes."""
    if name != "VGG":
        return _cifar.network(name, folder)
    images, epochs = (512, 1) if quick else (VGG_IMAGES, VGG_EPOCHS)
    kept = STATES / f"{name}-{images}-{epochs}.pt"
    torch.manual_seed(0)
    model = VGG()
    if not kept.exists():
        STATES.mkdir(parents=True, exist_ok=True)
        data = _cifar.data(folder, CACHE, 0, images, 500, BATCH)
        tune(model, None, data.train, epochs, 0.1)
        part = kept.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), part)
        part.replace(kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


def tune(model: nn.Module, teacher: nn.Module | None, train: Any, epochs: int, lr: float) -> None:
    """One cycle of stochastic gradient descent, on labels and what the teacher says, in bfloat16 where that is safe."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for x, y in train:
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x).float()
                with torch.no_grad():
                    aim = None if teacher is None else (teacher(x).float() / 4).softmax(1)
            loss = nn.functional.cross_entropy(out, y)
            if aim is not None:
                soft = -16 * (aim * (out / 4).log_softmax(1)).sum(1).mean()
                loss = 0.7 * loss + 0.3 * soft
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, test: Batches) -> float:
    """Percent."""
    with evaluating(model):
        return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in test) / test.samples


def largest(make_one: Callable[[float], nn.Module], budget: float, x: Tensor) -> float:
    """The largest share with which the MACs are within the budget."""
    low, high = 0.0, 1.0
    for _ in range(PROBES):
        middle = (low + high) / 2
        if macs(make_one(middle), x) <= budget:
            low = middle
        else:
            high = middle
    return low or high


def ours(model: nn.Module, way: str, budget: float, known: Batches, seed: int) -> nn.Module:
    """Split by the way's method; the share is found without the data and without iterations."""
    name, settings = WAYS[way]
    quick = {"lowrank.tucker": {"rounds": 0}, "lowrank.cp": {"rounds": 1, "starts": 1}}.get(name, {})
    plain = {k: v for k, v in settings.items() if k not in ("weight", "keep")}
    on = [p for p in SPLIT if p == "*" or any(n.startswith(p[1:] + ".") for n, _ in model.named_parameters())]

    def split(given: dict[str, Any], batches: Any = None) -> nn.Module:
        made = copy.deepcopy(model)
        edits = make(name, given).plan(made, select(targets(made), on), Known(batches=batches, seed=seed))
        apply_edits(made, edits, name)
        return made

    ratio = largest(lambda r: split({**plain, **quick, "ratio": r}), budget, known.inputs[:1])
    recipe = [{name: {**settings, "ratio": ratio, "on": on}}]
    job = smelt.Job(data=smelt.Data(train=known), seed=seed, latency=False)
    return smelt.compress(model, recipe, job).model


def theirs(model: nn.Module, kind: str, budget: float, x: Tensor) -> nn.Module:
    """tensorly-torch's layers in the place of the same convolutions."""
    from tltorch import FactorizedConv

    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n not in ("conv1", "features.0")]
    more = {"fixed_rank_modes": "spatial"} if kind == "tucker" else {}

    def made(rank: float, fitted: bool) -> nn.Module:
        new = copy.deepcopy(model)
        for path in paths:
            layer = FactorizedConv.from_conv(
                new.get_submodule(path), rank=rank, factorization=kind, implementation="factorized",
                decompose_weights=fitted, **more,
            )  # fmt: skip
            new.set_submodule(path, layer)
        return new.eval()

    torch.manual_seed(0)
    return made(largest(lambda rank: made(rank, False), budget, x), True)


def cell(
    name: str, side: str, way: str, factor: float, seed: int, folder: str, images: int, test: int, quick: bool
) -> Any:
    """One network split in one way: what it is then, and after training on `images`."""
    torch.set_num_threads(1)
    path = Path(folder)
    data = _cifar.data(path, CACHE, seed, max(images, BATCH), test, BATCH)
    known = _cifar.data(path, CACHE, seed, SCORED, 1, BATCH, None).train
    assert isinstance(data.test, Batches) and isinstance(known, Batches)
    model = network(name, path, quick)
    x = known.inputs[:1]
    base = macs(model, x)
    found: dict[str, Any] = {"dense": accuracy(model, data.test), "checkpoint": checkpoint_bytes(model)}
    if side == "dense":
        made = copy.deepcopy(model)
    elif side == "smelt":
        made = ours(model, way, base / factor, known, seed)
    else:
        made = theirs(model, way, base / factor, x)
    found["before"] = accuracy(made, data.test)
    if images:
        torch.manual_seed(seed)
        tune(made, model, data.train, 1, 0.02)
    with tempfile.TemporaryDirectory() as scratch:
        if side == "smelt":
            found["bytes"] = smelt.save(made, Path(scratch) / "model.smelt")
            made = smelt.load(Path(scratch) / "model.smelt", into=copy.deepcopy(model)).eval()
        else:
            torch.save(made.state_dict(), Path(scratch) / "model.pt")
            found["bytes"] = (Path(scratch) / "model.pt").stat().st_size
    found |= {
        "after": accuracy(made, data.test),
        "macs": macs(made, x) / base,
        "parameters": parameters(made) / parameters(model),
    }
    try:
        found["speed"] = prune_cifar.speed(model, made, known.inputs[: prune_cifar.LATENCY_BATCH])
    except Exception as error:  # the peer's layers may not be exported
        if side == "smelt":
            raise
        found["speed"], found["failed"] = {}, f"{type(error).__name__}: {error}"[:200]
    return found


def grid(args: Any, folder: Path) -> list[dict[str, Any]]:
    images, test = (128, 200) if args.quick else (20000, 10000) if args.long else (TUNE, TEST)
    given = {"folder": str(folder), "images": images, "test": test, "quick": args.quick}
    peer = bool(find_spec("tltorch"))
    if not peer:
        print("missing peer: tensorly-torch; pip install -r benchmarks/requirements.txt")
    if args.quick:
        points = [("smelt", "tucker, whitened", 2)] + [("tensorly-torch", "tucker", 2)] * peer
        return [{"name": "VGG", "side": s, "way": w, "factor": f, "seed": 0, **given} for s, w, f in points]
    ways = [*OURS, *GUARDED, *(MORE if args.long else ())]
    points = [("dense", "", 1)] + [("smelt", w, f) for f in FACTORS for w in ways]
    points += [("tensorly-torch", w, f) for f in FACTORS for w in PEERS] * peer
    return [
        {"name": n, "side": s, "way": w, "factor": f, "seed": seed, **given}
        for n in ("ResNet-20", "VGG")
        for s, w, f in points
        for seed in range(3 if args.long else 1)
    ]


def rows(cells: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[Row]:
    """Every way at every point; the best of ours against the best of theirs; the guarded against the dense."""
    points: dict[tuple[str, float, str, str], list[dict[str, Any]]] = {}
    for one, run in zip(cells, runs, strict=True):
        points.setdefault((one["name"], one["factor"], one["side"], one["way"]), []).append(run)
    means = {point: _mean(several) for point, several in points.items()}
    found: list[Row] = []
    for (name, factor, side, way), mean in means.items():
        label = f"{name}, dense, trained as long" if side == "dense" else f"{name}, {factor:g}x, {side}: {way}"
        found.append(Row(f"{label}: before training", round(mean["before"], 2), "%", "dense", round(mean["dense"], 2)))
        found.append(Row(f"{label}: after training", round(mean["after"], 2), "%", "dense", round(mean["dense"], 2)))
        found.append(Row(f"{label}: file", round(mean["bytes"]), "bytes", "fp32 checkpoint", mean["checkpoint"]))
        found.append(Row(f"{label}: MACs left", round(100 * mean["macs"], 1), "%"))
        for kind in ("eager", "ONNX Runtime"):
            if kind in mean:
                guard = "slower than dense nowhere" if way in GUARDED else None
                found.append(Row(f"{label}: faster, {kind}", round(mean[kind], 2), "x", target=guard))
        if "failed" in points[name, factor, side, way][0]:
            print(f"{label}: {points[name, factor, side, way][0]['failed']}")
    for name, factor in dict.fromkeys((n, f) for n, f, side, _ in means if side == "tensorly-torch"):
        found += _against(name, factor, means)
    return found


def _mean(several: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("dense", "before", "after", "bytes", "checkpoint", "macs", "parameters")
    found = {k: sum(run[k] for run in several) / len(several) for k in keys}
    for kind in several[0]["speed"]:
        found[kind] = sum(run["speed"][kind] for run in several) / len(several)
    return found


def _against(name: str, factor: float, means: dict[Any, dict[str, float]]) -> list[Row]:
    """At the bytes of each of the peer's ways, or fewer, the best of ours."""
    peers = {w: m for (n, f, s, w), m in means.items() if (n, f, s) == (name, factor, "tensorly-torch")}
    mine = {w: m for (n, f, s, w), m in means.items() if (n, f, s) == (name, factor, "smelt") and w not in GUARDED}
    found = []
    for when in ("before", "after"):
        best = max(peers, key=lambda w: peers[w][when])
        able = {w: m for w, m in mine.items() if m["bytes"] <= 1.02 * peers[best]["bytes"]}
        if not able:
            continue
        way = max(able, key=lambda w: able[w][when])
        pair = round(able[way][when], 2), round(peers[best][when], 2)
        label = f"{name}, {factor:g}x, {when} training, at the peer's bytes or fewer: best, {way}"
        found.append(Row(label, pair[0], "%", f"tensorly-torch, {best}", pair[1], "> the peer"))
    return found


def main() -> int:
    args = arguments(__doc__ or "")
    folder = _cifar.root()
    if folder is None:
        return 4
    print(conditions())
    cells = grid(args, folder)
    for name in {cell["name"] for cell in cells}:
        network(name, folder, args.quick)  # trained once, for all cells
    seconds = 12 if args.quick else 50 * (cells[0]["images"] + 6000) / (TUNE + 6000)
    runs = run_cells("lowrank_cifar", cell, cells, jobs=args.jobs, fresh=args.fresh, seconds=seconds)
    finish(rows(cells, runs), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
