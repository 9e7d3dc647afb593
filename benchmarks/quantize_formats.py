"""Every way to store a tensor in few bits, on the same tensors: bits per weight in the file, signal to noise, time.

    SMELT_DATA=... python benchmarks/quantize_formats.py

Five tensors, each the only weight of a model: Gaussian and Laplace numbers, a projection and the embedding of a trained
language model, a convolution of a trained ResNet-56.  Each codec stores the tensor, the file is entropy coded, written
and loaded again; bits are those of the whole file.  Signal to noise is that of the weight (mean square over mean square
of the error, in dB); methods that use data see inputs of that layer, and the signal to noise of the layer's outputs, on
other inputs, stands beside it.  No code can pass Shannon's bound, 6.02 dB a bit for Gaussian numbers.

With matplotlib installed the full run draws docs/rate_distortion.svg.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _bench import CACHE, HERE, Row, arguments, conditions, data_folder, finish, run_cells
from torch import Tensor, nn

import smelt

PLOT = HERE.parent / "docs" / "rate_distortion.svg"
SIDE = 1024  # of the generated tensors
SAMPLES = 16  # batches of inputs, half of them for calibration

TENSORS = ("Gaussian", "Laplace", "llama up_proj", "llama embedding", "ResNet-56 convolution")
QUICK = ("ResNet-56 convolution",)


def _over(key: str, field: str, values: Any, **more: Any) -> dict[str, dict[str, Any]]:
    """Label of a curve's point -> the step."""
    return {f"{v}": {key: {field: v, **more}} for v in values}


GROUP = {"per": "group", "group": 64, "scales": "float16"}
# curve -> label of the point -> step
CURVES: dict[str, dict[str, dict[str, Any]]] = {
    "affine, per channel": _over("quantize.affine", "bits", (2, 3, 4, 6, 8)),
    "affine, groups of 64": _over("quantize.affine", "bits", (2, 3, 4, 6, 8), **GROUP),
    "affine, groups of 64, least error": _over("quantize.affine", "bits", (1, 2, 3, 4), range="mse", **GROUP),
    "fixed point": _over("quantize.fixed", "bits", (4, 6, 8)),
    "float": _over("quantize.float", "format", ("fp16", "bf16", "e4m3", "e5m2", "fp4")),
    "MX": _over("quantize.float", "format", ("mxfp8", "mxfp6", "mxfp4")),
    "normal float, groups of 64": _over("quantize.float", "bits", (2, 3, 4), format="nf", **GROUP),
    "log": _over("quantize.log", "bits", (3, 4, 5)),
    "power": _over("quantize.power", "bits", (3, 4, 6)),
    "binary": {"1": {"quantize.binary": {}}, "2": {"quantize.binary": {"bases": 2}}},
    "binary, rotated": {"1": {"quantize.binary": {"rotate": "hadamard"}}},
    "ternary": {"1.58": {"quantize.ternary": {}}},
    "histogram": _over("quantize.histogram", "classes", (4, 8, 16)),
    "buckets": _over("quantize.buckets", "bits", (2, 3, 4)),
    "factored": _over("quantize.factored", "share", (0.25, 0.5, 0.75)),
    "k-means": _over("share.kmeans", "clusters", (4, 8, 16, 64)),
    "k-means, priced bits": _over("share.kmeans", "clusters", (16, 32, 64), rate=2.0),
    "HQQ, groups of 64": _over("quantize.hqq", "bits", (2, 3, 4), scales="float16"),
    "GPTQ, groups of 64": _over("quantize.gptq", "bits", (2, 3, 4)),
    "AdaRound, groups of 64": _over("quantize.adaround", "bits", (2, 3, 4)),
    "coded, for the weights": _over("quantize.entropy", "bits", (1, 2, 3, 4), error="weights"),
    "coded, for the outputs": _over("quantize.entropy", "bits", (1, 2, 3, 4), error="outputs"),
}
SHORT = ("affine, per channel", "float", "binary", "k-means", "log")


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def tensor(name: str) -> tuple[nn.Module, list[Tensor]] | None:
    """(the layer, what enters it, in batches); None where its data is missing."""
    generator = torch.Generator().manual_seed(0)
    if name in ("Gaussian", "Laplace"):
        layer = nn.Linear(SIDE, SIDE, bias=False)
        x = torch.randn(SIDE, SIDE, generator=generator)
        if name == "Laplace":
            uniform = torch.rand(SIDE, SIDE, generator=generator) - 0.5
            x = -uniform.sign() * torch.log1p(-2 * uniform.abs())
        layer.weight.data = x
        return layer, [torch.randn(256, SIDE, generator=generator) for _ in range(SAMPLES)]
    return _trained(name)


def _trained(name: str) -> tuple[nn.Module, list[Tensor]] | None:
    if name.startswith("llama"):
        from _llama import calibration, read

        folder = data_folder("llama-bytes")
        if folder is None:
            return None
        model: nn.Module = read(folder)
        path = "model.embed_tokens" if name.endswith("embedding") else "model.layers.2.mlp.up_proj"
        batches = list(calibration(folder, 4 * SAMPLES, 0).split(4))
    else:
        import _cifar

        folder = data_folder("cifar10_jpeg")
        if folder is None:
            return None
        model, path = _cifar.network("ResNet-56", folder.parent), "layer3.4.conv2"
        images = _cifar.data(folder.parent, CACHE, 0, 32 * SAMPLES, 1, 32, None).train
        batches = [x for x, _ in images or ()]
    layer, seen = model.get_submodule(path), []
    with torch.no_grad():
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for x in batches:
            model(x)
    layer._forward_pre_hooks.clear()
    return layer, seen


def cell(name: str, curves: list[str]) -> list[dict[str, Any]]:
    """Every point of the curves on one tensor."""
    torch.set_num_threads(1)
    given = tensor(name)
    assert given is not None
    layer, seen = given
    model, half = One(layer), len(seen) // 2
    weight = layer.weight.detach()
    assert isinstance(weight, Tensor)
    data = smelt.Data(train=[(x, None) for x in seen[:half]])
    found = []
    for curve in curves:
        for label, step in CURVES[curve].items():
            point: dict[str, Any] = {"curve": curve, "label": label}
            start = time.process_time()
            try:
                result = smelt.compress(model, {"steps": [step, "code.entropy"]}, smelt.Job(data=data, latency=False))
            except smelt.SmeltError as error:
                found.append({**point, "refused": str(error)})
                continue
            point["seconds"] = time.process_time() - start
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "one.smelt"
                size = result.save(path)
                loaded = smelt.load(path, into=One(_fresh(layer)))
            point["bits"] = 8 * size / weight.numel()
            point["weight"] = decibels(weight, loaded.layer.weight.detach())
            with torch.no_grad():
                outputs = [torch.cat([m(x).flatten() for x in seen[half:]]) for m in (model, loaded)]
            point["output"] = decibels(*outputs)
            found.append(point)
    return found


def _fresh(layer: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(layer)


def decibels(x: Tensor, y: Tensor) -> float:
    noise = float((x.double() - y.double()).square().mean())
    return 10 * math.log10(float(x.double().square().mean()) / max(noise, 1e-30))


def rows(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    made = []
    for name, points in found.items():
        for p in points:
            label = f"{name}, {p['curve']}, {p['label']}"
            if "refused" in p:
                made.append(Row(f"{label}: refused, {p['refused']}", None))
                continue
            target = "below Shannon's bound" if name == "Gaussian" else None
            bound = round(20 * math.log10(2) * p["bits"], 2) if name == "Gaussian" else None
            made.append(Row(f"{label}, bits", round(p["bits"], 3), "bits per weight"))
            peer = "Shannon" if bound is not None else None
            made.append(Row(f"{label}, weight", round(p["weight"], 2), "dB", peer, bound, target))
            made.append(Row(f"{label}, output", round(p["output"], 2), "dB"))
            made.append(Row(f"{label}, time", round(p["seconds"], 2), "s"))
    return made


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    print("\n| | " + " | ".join(f"{name}: bits, dB, outputs" for name in found) + " |")
    print("|---" * (1 + len(found)) + "|")
    for curve, labels in CURVES.items():
        for label in labels:
            cells = []
            for points in found.values():
                one = next((p for p in points if (p["curve"], p["label"]) == (curve, label)), None)
                shown = one is not None and "bits" in one
                cells.append(f"{one['bits']:.2f}, {one['weight']:.1f}, {one['output']:.1f}" if one and shown else "")
            if any(cells):
                print(f"| {curve}, {label} | " + " | ".join(cells) + " |")


def main() -> int:
    args = arguments(__doc__ or "")
    print(conditions())
    names = QUICK if args.quick else TENSORS
    if any(data_folder(folder) is None for folder in ("cifar10_jpeg", "resnet_cifar10", "llama-bytes")):
        return 4
    curves = list(SHORT if args.quick else CURVES)
    cells = [{"name": name, "curves": [curve]} for name in names for curve in curves]
    runs = run_cells("quantize_formats", cell, cells, jobs=args.jobs, fresh=args.fresh, seconds=5 if args.quick else 12)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for one, run in zip(cells, runs, strict=True):
        found[one["name"]] += run
    table(found)
    finish([], args.json, rows(found))
    if not args.quick:
        try:
            from _rate_plot import draw

            draw(PLOT, found, list(CURVES))
        except ImportError:
            print("missing: matplotlib, so there is no plot; pip install -r benchmarks/requirements.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
