"""Structured pruning of trained ResNet-20 and ResNet-56 on CIFAR-10 at 2x and 3x fewer MACs, against Torch-Pruning.

    SMELT_DATA=... python benchmarks/prune_cifar.py

Both sides cut the same trained network until its MACs, counted on the cut network by the same counter, are at most the
budget, and are then trained by the same step for the same number of images (`train` with distillation from the
uncut network).  Accuracy is taken on the 10,000 test images, right after cutting and after training.  The images are
JPEGs, on which the networks, trained on exact pixels, have been trained further; the uncut network trained as long
again is the baseline.  Torch-Pruning scores on the same batches; each of its scores stands at the better of its two
ways to be used here: everything, or only within blocks.

Beside it, unstructured: `prune.weights` while the same training runs, and the bytes of the written file.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _cifar
import torch
from _bench import CACHE, Row
from torch import Tensor, nn

import smelt
from smelt.core.data import Batches, evaluating
from smelt.measures.bytes import checkpoint_bytes
from smelt.measures.latency import latencies
from smelt.measures.macs import macs
from smelt.measures.parameters import parameters

STATES = CACHE / "prune_cifar-states"
BATCH = 128
SCORED = 1024  # images that scores are computed from
IMAGES = 12000  # images to train on, once
LATENCY_BATCH = 64
TRAIN = {"epochs": 1, "lr": 0.02, "optimizer": "sgd", "weight_decay": 5e-4, "precision": "bfloat16", "keep": "last"}
TEACH = {"distill.logits": {"temperature": 4.0, "alpha": 0.3}}
ADAPT = 20000  # images that ResNet-56 sees twice, to know JPEGs

SCORES = ("taylor", "hessian", "magnitude", "activation", "apoz", "batchnorm", "median", "random")
OURS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "fisher, 4 rounds": {"rounds": 4},
    "fisher, no repair": {"repair": "none"},
    "fisher, bias": {"repair": "bias"},
    "fisher, isomorphic": {"scope": "isomorphic"},
    **{score: {"score": score} for score in SCORES},
}
BEST = ("fisher", "fisher, 4 rounds")
WITHIN = ", within blocks"
PEERS = [
    *("magnitude, local", f"magnitude, local{WITHIN}", f"magnitude, global{WITHIN}", f"batchnorm, global{WITHIN}"),
    *(f"taylor, local{WITHIN}", f"taylor, global{WITHIN}"),
]
SLOW = f"hessian, global{WITHIN}"  # takes a backward pass of a batch for every sample
STRONG = PEERS[1:3] + PEERS[5:]  # those that ResNet-56 and further seeds are tried with
FACTORS = (2, 3)
SPARSE = (0.8, 0.9, 0.95)


def job(data: smelt.Data, teacher: Any = None, seed: int = 0) -> smelt.Job:
    return smelt.Job(data=smelt.Data(train=data.train), teacher=teacher, seed=seed, latency=False)


def network(name: str, folder: Path) -> _cifar.ResNet:
    """The network that is cut: trained on JPEGs, too."""
    model = _cifar.network(name, folder)
    kept = STATES / f"{name}-{ADAPT}.pt"
    if name in _cifar.ADAPTED:
        return model
    if not kept.exists():
        STATES.mkdir(parents=True, exist_ok=True)
        data = _cifar.data(folder, CACHE, 0, ADAPT, 500, BATCH)
        steps = [{"train": TRAIN | {"epochs": 2}}]
        state = smelt.compress(model, {"steps": steps}, job(data)).model.state_dict()
        part = kept.with_suffix(f".{os.getpid()}")
        torch.save(state, part)
        part.replace(kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


def accuracy(model: nn.Module, test: Batches) -> float:
    """Percent, computed in bfloat16, channels last."""
    right = 0
    with evaluating(model), torch.autocast("cpu", torch.bfloat16):
        for x, y in test:
            right += int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
    return 100 * right / test.samples


def cell(
    name: str, side: str, way: str, factor: float, seed: int, folder: str, images: int, scored: int, test: int | None
) -> Any:
    """One network cut in one way, by what `scored` images say: what it is then, and after training on `images`."""
    torch.set_num_threads(1)
    path = Path(folder)
    data = _cifar.data(path, CACHE, seed, images, test, BATCH)
    known = _cifar.data(path, CACHE, seed, scored, 1, BATCH, None).train
    assert isinstance(data.test, Batches) and isinstance(known, Batches)
    model = network(name, path)
    base = macs(model, known.inputs[:1])
    cut, pieces = model, [TEACH]
    if side == "smelt":
        settings = {"ratio": 1 - 1 / factor, "of": "macs"} | OURS[way]
        cut = smelt.compress(
            model, {"steps": [{"prune.channels": settings}]}, job(smelt.Data(train=known), seed=seed)
        ).model
    elif side == "sparse":
        pieces = [TEACH, {"prune.weights": {"ratio": {"ramp": [0.5, factor]}, "scope": "global"}}]
    elif side == "Torch-Pruning":
        cut = torch_pruning(name, path, way, base / factor, known)
    found: dict[str, Any] = {"before": accuracy(cut, data.test)}
    after = cut
    if images:
        source = smelt.Source.of(cut, "_cifar:build", {"blocks": _cifar.DEPTH[name]})
        after = smelt.compress(source, {"steps": [{"train": TRAIN | {"with": pieces}}]}, job(data, model, seed)).model
    found |= {
        "after": accuracy(after, data.test),
        "macs": macs(after, known.inputs[:1]) / base,
        "parameters": parameters(after) / parameters(model),
    }
    with tempfile.TemporaryDirectory() as scratch:
        found["bytes"] = smelt.save(after, Path(scratch) / "model.smelt")
    found["checkpoint"] = checkpoint_bytes(model)
    found["speed"] = speed(model, after, known.inputs[:LATENCY_BATCH])
    return found


def torch_pruning(name: str, folder: Path, way: str, budget: float, scored: Batches) -> nn.Module:
    """Torch-Pruning with the least ratio that meets the budget of MACs."""
    import _torchvision

    _torchvision.prepare()
    import torch_pruning as tp

    score, scope = way.removesuffix(WITHIN).split(", ")
    importance = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "batchnorm": tp.importance.BNScaleImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }[score]()

    def made(ratio: float) -> nn.Module:
        model = network(name, folder)
        outside = [model.linear]
        if way.endswith(WITHIN):
            outside += [model.conv1, *(m for p, m in model.named_modules() if p.endswith("conv2"))]
        kind = tp.pruner.BNScalePruner if score == "batchnorm" else tp.pruner.MagnitudePruner
        pruner = kind(
            model, scored.inputs[:1], importance, global_pruning=scope == "global", pruning_ratio=ratio,
            max_pruning_ratio=0.9, ignored_layers=outside,
        )  # fmt: skip
        if score in ("taylor", "hessian"):
            slopes(model, importance if score == "hessian" else None, scored)
        pruner.step()
        model.zero_grad()
        return model.eval()

    low, high = 0.0, 0.95
    best = made(high)
    for _ in range(8):
        middle = (low + high) / 2
        model = made(middle)
        if macs(model, scored.inputs[:1]) <= budget:
            high, best = middle, model
        else:
            low = middle
    return best


def slopes(model: nn.Module, importance: Any, scored: Batches) -> None:
    """Gradients of the loss as Torch-Pruning's scores want them: their sum, or one by one for `importance`."""
    model.eval()
    if importance is None:
        for x, y in scored:
            nn.functional.cross_entropy(model(x), y).backward()
        return
    importance.zero_grad()
    count = 0
    for x, y in scored:
        for loss in nn.functional.cross_entropy(model(x), y, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)
            count += 1
        if count >= 256:
            return


def speed(before: nn.Module, after: nn.Module, x: Tensor) -> dict[str, float]:
    """Times that a forward is faster, eager and, where it is installed, in ONNX Runtime."""
    x = x.contiguous()
    found = {}
    with torch.no_grad():
        took = latencies({"before": lambda: before(x), "after": lambda: after(x)}, repeats=15, warmup=3)
    found["eager"] = took["before"].median / took["after"].median
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return found
    calls = {}
    for name, model in (("before", before), ("after", after)):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"])
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        calls[name] = lambda session=session: session.run(None, {"x": x.numpy()})
    took = latencies(calls, repeats=15, warmup=3)
    found["ONNX Runtime"] = took["before"].median / took["after"].median
    return found


def estimate(cells: list[dict[str, Any]]) -> float:
    """Seconds of a cell, on average."""
    took = [(50 if cell["name"] == "ResNet-20" else 140) * (cell["images"] + 6000) / (IMAGES + 6000) for cell in cells]
    return sum(took) / len(took)


def grid(args: Any, folder: Path) -> list[dict[str, Any]]:
    def cells(name: str, side: str, ways: Any, factors: Any = FACTORS, seeds: Any = (0,)) -> list[dict[str, Any]]:
        images, scored, test = (1000, 256, 1000) if args.quick else (IMAGES, SCORED, None)
        given = {"folder": str(folder), "images": images, "scored": scored, "test": test}
        points = [(w, f, s) for f in factors for w in ways for s in seeds]
        return [{"name": name, "side": side, "way": w, "factor": f, "seed": s, **given} for w, f, s in points]

    peer = "Torch-Pruning" if find_spec("torch_pruning") else ""
    if not peer:
        print("missing peer: torch-pruning; pip install -r benchmarks/requirements.txt")
    if args.quick:
        found = cells("ResNet-20", "smelt", ["fisher"], [2]) + cells("ResNet-20", peer, STRONG[:1], [2])
        return [one for one in found if one["side"]]
    seeds = range(5 if args.long else 2)
    found = cells("ResNet-20", "uncut", [""], [1], seeds)
    found += cells("ResNet-20", "smelt", [w for w in OURS if w not in BEST]) + cells(
        "ResNet-20", "smelt", BEST, FACTORS, seeds
    )
    weak = [w for w in PEERS if w not in STRONG] + ([SLOW] if args.long else [])
    found += cells("ResNet-20", peer, weak) + cells("ResNet-20", peer, STRONG, FACTORS, seeds)
    found += cells("ResNet-20", "sparse", [""], SPARSE)
    many = seeds if args.long else [0]
    found += cells("ResNet-56", "uncut", [""], [1], many) + cells("ResNet-56", "smelt", BEST, FACTORS, many)
    found += cells("ResNet-56", peer, STRONG, FACTORS, many)
    return [one for one in found if one["side"]]


def rows(cells: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[Row]:
    """Every way at every point, and the best of ours against the best of theirs."""
    points: dict[tuple[str, str, float, str], list[dict[str, Any]]] = {}
    for one, run in zip(cells, runs, strict=True):
        points.setdefault((one["name"], one["side"], one["factor"], one["way"]), []).append(run)
    found: list[Row] = []
    means: dict[tuple[str, str, float], dict[str, dict[str, float]]] = {}
    noise: list[float] = []
    for (name, side, factor, way), several in points.items():
        mean = {
            k: statistics.mean(run[k] for run in several) for k in ("before", "after", "macs", "parameters", "bytes")
        }
        mean |= {k: statistics.mean(run["speed"][k] for run in several) for k in several[0]["speed"]}
        means.setdefault((name, side, factor), {})[way] = mean
        if len(several) > 1:
            noise.append(statistics.stdev(run["after"] for run in several))
        if side == "uncut":
            found.append(Row(f"{name}, uncut, trained as long", round(mean["after"], 2), "%"))
        elif side == "sparse":
            label = f"{name}, {factor:.0%} zeros"
            found.append(Row(f"{label}, accuracy", round(mean["after"], 2), "%"))
            found.append(Row(f"{label}, file", mean["bytes"], "bytes", "fp32 checkpoint", several[0]["checkpoint"]))
        else:
            label = f"{name}, {factor:g}x, {side}: {way}"
            found.append(Row(f"{label}, before training", round(mean["before"], 2), "%"))
            found.append(Row(f"{label}, after training", round(mean["after"], 2), "%"))
    spread = statistics.median(noise) if noise else 0.0
    if noise:
        found.append(Row("standard deviation over seeds, after training", round(spread, 2), "points"))
    for name, side, factor in means:
        theirs = means.get((name, "Torch-Pruning", factor))
        if side == "smelt" and theirs:
            found += _against(f"{name}, {factor:g}x", means[name, side, factor], theirs, spread)
    return found


def _against(label: str, ours: dict[str, Any], theirs: dict[str, Any], spread: float) -> list[Row]:
    found = []
    for when in ("before", "after"):
        mine, other = (max(side, key=lambda way: side[way][when]) for side in (ours, theirs))
        target = f"> the peer by more than {spread:.2f}"
        pair = (round(ours[mine][when], 2), round(theirs[other][when], 2))
        measure = f"{label}, {when} training: best, {mine}"
        found.append(Row(measure, pair[0], "%", f"Torch-Pruning, {other}", pair[1], target))
    for kind in ("eager", "ONNX Runtime"):
        if kind in ours[mine]:
            found.append(
                Row(f"{label}, faster, {kind}", round(ours[mine][kind], 2), "x", other, round(theirs[other][kind], 2))
            )
    share = (round(100 * ours[mine]["macs"], 1), round(100 * theirs[other]["macs"], 1))
    return [*found, Row(f"{label}, MACs left", share[0], "%", other, share[1])]


def main() -> int:
    return _cifar.run("prune_cifar", __doc__ or "", grid, cell, rows, estimate, network)


if __name__ == "__main__":
    sys.exit(main())
