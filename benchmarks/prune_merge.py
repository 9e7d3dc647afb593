"""Neurons taken out without fine-tuning: LeNet-300-100 on MNIST, against plain pruning and neuron merging.

    SMELT_DATA=... python benchmarks/prune_merge.py

50 to 80 % of the neurons of both hidden layers go.  Every network is trained here (five seeds) and every accuracy is
that of the written file, loaded again, on the 10,000 test images.  Sides:

    pruning    the smallest rows of weights and bias by l1 or l2 norm go, or random ones
    Kim        neuron merging as published (Kim et al. 2020, arXiv:2010.13160): pruned by l1 norm, l2 norm or the sum
               of distances to all others (GM); then each joins the row left with the largest cosine, times the ratio
               of lengths, where the cosine is at least 0.45, the threshold that they took for this network; all of
               it is computed on the original rows of weights and bias.  Also without the threshold, which on these
               networks is sometimes better; ours stand against the best of the six
    ours       prune.merge by weights (no data), and by activations of 1,000 or 10,000 training images without labels

Then units that are known to be superfluous are planted into three networks, and must go without a trace.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import _mnist
import torch
from _bench import Row, arguments, conditions, data_folder, finish, run_cells
from torch import Tensor, nn

import smelt
from smelt.measures.accuracy import evaluate

SEEDS = range(5)
RATIOS = (0.5, 0.6, 0.7, 0.8)
TRAIN = {"epochs": 15, "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.05, "keep": "last"}
THRESHOLDS = {"pruning": None, "Kim": 0.45, "Kim, any cosine": -1.0}
BATCHES = 16  # what prune.merge looks at
OURS: dict[str, tuple[int, dict[str, Any]]] = {
    "ours, no data": (0, {"by": "weights"}),
    "ours, 1,000 images": (1000, {"by": "activations"}),
    "ours, 10,000 images": (10000, {"by": "activations"}),
}
PRUNED, MERGED = ("random", "l1", "l2"), ("l1", "l2", "GM")
PLANTED = ("LeNet-300-100", "LeNet-5", "residual network with batch norm")


def network(folder: str, seed: int, epochs: int, ratios: list[float]) -> dict[str, Any]:
    """Train one network; {side: [accuracy per ratio]}, and 'trained': [its own]."""
    torch.set_num_threads(1)
    x, _ = _mnist.read(Path(folder), "train")
    held = smelt.Batches(*_mnist.read(Path(folder), "test"), 1000)
    data = _mnist.data(Path(folder), seed, 128)
    torch.manual_seed(seed)
    model, builder, given = smelt.open_model("lenet300")
    step = {"train": TRAIN | {"epochs": epochs}}
    model = smelt.compress(model, {"steps": [step]}, smelt.Job(data=data, seed=seed, latency=False)).model
    found = {"trained": [_accuracy(model, held, None)]}
    for kind, threshold in THRESHOLDS.items():
        for how in PRUNED if threshold is None else MERGED:
            made = [peer(model, ratio, how, threshold, seed) for ratio in ratios]
            found[f"{kind}, {how}"] = [_accuracy(small, held, small) for small in made]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[_mnist.HELD_OUT :]
    for side, (images, settings) in OURS.items():
        seen = smelt.Batches(x[order[:images]], None, -(-images // BATCHES)) if images else None
        found[side] = []
        for ratio in ratios:
            source = smelt.Source.of(model, builder, given)
            job = smelt.Job(data=smelt.Data(train=seen) if seen else None, seed=seed, latency=False)
            result = smelt.compress(source, [{"prune.merge": {"ratio": ratio, **settings}}], job).model
            if widths(result) != [n - int(ratio * n) for n in widths(model)]:
                raise SystemExit(f"{side} at {ratio}: {widths(result)} neurons left")
            found[side].append(_accuracy(result, held, None))
    return found


def widths(model: nn.Module) -> list[int]:
    return [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)][:-1]


def _accuracy(model: nn.Module, held: smelt.Batches, into: nn.Module | None) -> float:
    """Of the file; `into`: another network than LeNet-300-100, whose shape the file is loaded into."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.smelt"
        smelt.save(model, path)
        hidden = list(widths(into)) if into is not None else [300, 100]
        loaded = smelt.load(path, into=smelt.open_model("lenet300", arguments={"hidden": hidden})[0])
        return float(evaluate(loaded, held, "accuracy"))


@torch.no_grad()
def peer(model: nn.Module, ratio: float, how: str, threshold: float | None, seed: int) -> nn.Module:
    """The network pruned by `how`, and merged where there is a threshold."""
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    made = smelt.open_model("lenet300", arguments={"hidden": [n - int(ratio * n) for n in widths(model)]})[0]
    new = [layer for layer in made.modules() if isinstance(layer, nn.Linear)]
    mix: Tensor | None = None  # [neurons of the layer before, those left]: who stands for whom
    for old, small in zip(layers, new, strict=True):
        incoming = old.weight if mix is None else old.weight @ mix
        left = torch.arange(len(incoming))
        if small.out_features < old.out_features:
            rows = torch.cat([old.weight, old.bias[:, None]], 1)
            score = {
                "random": torch.rand(len(rows), generator=generator),
                "l1": rows.abs().sum(1),
                "l2": rows.norm(dim=1),
                "GM": torch.cdist(rows, rows).sum(1),
            }[how]
            left = score.topk(small.out_features).indices.sort().values
            mix = torch.zeros(len(rows), len(left))
            if threshold is not None:
                unit = rows / rows.norm(dim=1, keepdim=True)
                cosine, nearest = (unit @ unit[left].T).max(1)
                scale = rows.norm(dim=1) / rows[left][nearest].norm(dim=1)
                mix[torch.arange(len(rows)), nearest] = torch.where(cosine >= threshold, scale, 0)
            mix[left] = torch.eye(len(left))
        small.weight.copy_(incoming[left])
        small.bias.copy_(old.bias[left])
    return made.eval()


@torch.no_grad()
def planted(kind: str, seed: int) -> dict[str, float]:
    """Plant twins, scaled twins, dead and unheard units; how many, how many went, the largest difference of outputs."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    spec = {"LeNet-300-100": "lenet300", "LeNet-5": "lenet"}.get(kind, "resnet_digits")
    model, builder, given = smelt.open_model(spec)
    model.eval()
    x = torch.rand(256, 1, *[8 if spec == "resnet_digits" else 28] * 2)
    places: list[tuple[nn.Module, nn.Module | None, nn.Module]] = []  # layer, norm, consumer
    if spec == "resnet_digits":
        blocks = [block for stage in model.stages for block in stage]
        places = [(block.conv1, block.bn1, block.conv2) for block in blocks]
    else:
        layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        places = [(first, None, second) for first, second in pairwise(layers)]
    number = 0
    for first, norm, second in places:
        number += plant(first, norm, second)
    before = model(x)
    result = smelt.compress(
        smelt.Source.of(model, builder, given), ["prune.merge"], smelt.Job(seed=seed, latency=False)
    )
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "model.smelt")
        loaded = smelt.load(Path(folder) / "model.smelt")
    left = [len(first.weight) for first, _, _ in places]
    now = [len(m.weight) for name, m in loaded.named_modules() if name in _names(model, places)]
    return {"planted": number, "gone": sum(left) - sum(now), "apart": float((loaded(x) - before).abs().max())}


def _names(model: nn.Module, places: list[tuple[nn.Module, nn.Module | None, nn.Module]]) -> set[str]:
    firsts = {id(first) for first, _, _ in places}
    return {name for name, module in model.named_modules() if id(module) in firsts}


def plant(first: nn.Module, norm: nn.Module | None, second: nn.Module) -> int:
    """Make the last fifth of a layer's units superfluous, in four ways in turn; how many these are."""
    units = len(first.weight)
    doomed = range(units - units // 5, units)
    if norm is not None:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(units) + 0.1)
    for turn, j in enumerate(doomed):
        i, way = turn, turn % 4
        if way < 2:  # a twin, or one that is 1.7 times as much
            scale = 1.7 if way else 1.0
            first.weight[j] = first.weight[i] * (scale if norm is None else 1.0)
            if norm is None:
                first.bias[j] = first.bias[i] * scale
            else:
                for tensor in (norm.weight, norm.bias):
                    tensor[j] = tensor[i] * scale
                norm.running_mean[j], norm.running_var[j] = norm.running_mean[i], norm.running_var[i]
        elif way == 2:  # nobody listens
            size = second.weight.shape[1] // units
            second.weight[:, j * size : (j + 1) * size] = 0
        elif norm is None:  # gives 0
            first.weight[j], first.bias[j] = 0, 0
        else:
            norm.weight[j], norm.bias[j] = 0, -1
    return len(doomed)


def rows(runs: list[dict[str, Any]], ratios: list[float]) -> list[Row]:
    """Means over the seeds; ours stand against the best of the published merging, at the same ratio."""
    base = statistics.mean(run["trained"][0] for run in runs)
    found = [Row("LeNet-300-100, trained", round(base, 2), "%")]
    for at, ratio in enumerate(ratios):
        mean = {side: statistics.mean(run[side][at] for run in runs) for side in runs[0] if side != "trained"}
        best = max((side for side in mean if side.startswith("Kim")), key=mean.__getitem__)
        for side, value in mean.items():
            spread = f"% +- {statistics.pstdev(run[side][at] for run in runs):.2f}"
            row = Row(f"{ratio:.0%} gone, {side}", round(value, 2), spread)
            found.append(row)
            if side in OURS:
                row.peer, row.peer_value = best, round(mean[best], 2)
                share = 100 * (value - mean[best]) / (base - mean[best])
                target = ">= 50 %" if ratio == max(RATIOS) else None
                found.append(
                    Row(f"{ratio:.0%} gone, {side}: of {best}'s error, gone", round(share, 1), "%", target=target)
                )
    return found


def planted_rows(results: list[dict[str, float]]) -> list[Row]:
    found = []
    for kind, result in zip(PLANTED, results, strict=True):
        target = f"{result['planted']:.0f}"
        found.append(Row(f"{kind}, planted units gone", result["gone"], "units", target=target))
        found.append(Row(f"{kind}, largest difference of outputs", result["apart"], "", target="<= 1e-6"))
    return found


def main() -> int:
    args = arguments(__doc__ or "")
    folder = data_folder("mnist")
    if folder is None:
        return 4
    print(conditions())
    quick = args.quick
    seeds, epochs, ratios = (range(1), 2, [0.8]) if quick else (SEEDS, TRAIN["epochs"], [*RATIOS])
    cells = [{"folder": str(folder), "seed": seed, "epochs": epochs, "ratios": ratios} for seed in seeds]
    expected = 2.5 * epochs + 12 * len(ratios)
    runs = run_cells("prune_merge", network, cells, jobs=args.jobs, fresh=args.fresh, seconds=expected)
    kinds = [{"kind": kind, "seed": 0} for kind in PLANTED]
    exact = run_cells("planted units", planted, kinds, jobs=args.jobs, fresh=args.fresh, seconds=5)
    finish(rows(runs, ratios) + planted_rows(exact), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
