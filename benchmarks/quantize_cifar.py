"""Quantization of weights and activations of trained ResNet-20 and ResNet-56 on CIFAR-10.

    SMELT_DATA=... python benchmarks/quantize_cifar.py

WxAy: weights of x bits with a scale per channel, inputs of all layers of y bits with a scale per tensor that was found
once.  Below 8 bits the first and the last layer keep 8 of both.  Settings were chosen on training images.  Three ways:
by calibration on 1,024 training images without labels, in closed form; `tuned`, the same 1,024 images seen again and
again with the outputs of the original as the only guide; and `trained`, with labels, against the fp32 network that was
trained as long (the table says how long).

Accuracy is that of the written file, loaded again, on the 10,000 test images.  Quantized inputs are simulated in fp32:
no integer kernel runs them.  The images are JPEGs, on which the networks, trained on exact pixels, were tuned.

Peers in the same run, on the same images: every weight and input rounded to nearest over its smallest and largest value
(`minmax`), and ONNX Runtime's static quantization, which runs in its integer kernels.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _cifar
import torch
from _bench import CACHE, Row
from prune_cifar import network
from torch import Tensor, nn

import smelt
from smelt.core.data import Batches, evaluating
from smelt.measures.bytes import checkpoint_bytes

BATCH = 128
CALIBRATED = 1024  # images, without labels
IMAGES, EPOCHS = 50000, 4  # that are seen with labels, and how often
EDGES, INNER = ["conv1", "linear"], ["*", "!conv1", "!linear"]
FOLD = {"swap.fold_norm": {}}
LABELS = {"distill.logits": {"temperature": 4.0, "alpha": 0.3}}
GUIDE = {"distill.logits": {"temperature": 4.0, "alpha": 0.0}}
LOOP = {"optimizer": "sgd", "weight_decay": 0.0, "precision": "bfloat16", "keep": "last"}


def weights(bits: int, on: Any = "*", **settings: Any) -> dict[str, Any]:
    return {"quantize.affine": {"bits": bits, "range": "mse", "on": on} | settings}


def inputs(bits: int, on: Any = "*", **settings: Any) -> dict[str, Any]:
    return {"quantize.affine": {"bits": bits, "range": "mse", "at": "input", "dynamic": False, "on": on} | settings}


def rounded(bits: int) -> dict[str, Any]:
    """Inner weights rounded so that errors make up for one another."""
    settings = {"bits": bits, "symmetric": True, "per": "channel", "scales": "float32"}
    settings |= {"gather": "layer", "on": INNER}
    return {"quantize.gptq": settings}


def calibrated(w: int, a: int) -> list[Any]:
    """In closed form: where inputs are coarse, the weights are fitted to them before they are rounded themselves."""
    first = [inputs(8)] if a == 8 else [inputs(8, EDGES), inputs(a, INNER), {"swap.correct": {"weights": True}}]
    second = [weights(8)] if w == 8 else [weights(8, EDGES), rounded(w)]
    return [FOLD, *first, *second, "swap.correct", "code.entropy"]


def learned(w: int, a: int) -> list[Any]:
    """The codecs of a train step, with learned scales."""
    found = [weights(8, EDGES, learn=True), weights(w, INNER, learn=True)]
    return [*found, inputs(8, EDGES, learn=True), inputs(a, INNER, learn=True)]


def tuned(w: int, a: int, epochs: int) -> list[Any]:
    """The network without its batch norms, trained to give the outputs that it gave."""
    loop = LOOP | {"optimizer": "adam", "epochs": epochs, "lr": 1e-4}
    return [FOLD, {"train": loop | {"with": [GUIDE, *learned(w, a)]}}, "code.entropy"]


def trained(w: int, a: int, epochs: int) -> list[Any]:
    settings = {"weight_decay": 1e-4, "epochs": epochs, "lr": 0.02}
    pieces = [LABELS] if w == 32 else [LABELS, *learned(w, a)]
    return [{"train": LOOP | settings | {"with": pieces}}, "code.entropy"]


def accuracy(model: nn.Module, test: Batches) -> float:
    """Percent, in fp32."""
    right = 0
    with evaluating(model):
        for x, y in test:
            right += int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
    return 100 * right / test.samples


def cell(
    name: str, way: str, w: int, a: int, seed: int, folder: str, images: int, epochs: int, test: int | None
) -> dict[str, float]:
    """One network quantized in one way, by `images` images seen `epochs` times: accuracy in percent, bytes, seconds."""
    torch.set_num_threads(1)
    path = Path(folder)
    model = network(name, path)
    tested = _cifar.data(path, CACHE, seed, 1, test).test
    assert isinstance(tested, Batches)
    x, y = _cifar.read(path, "train", CACHE)
    if way in ("calibrated", "tuned", *PEERS):
        x, y = x[seed * images : (seed + 1) * images], None
    change = _cifar.moved if way in ("tuned", "trained") else None
    seen = Batches(_cifar.scaled(x[:images]), None if y is None else y[:images], BATCH, True, seed, change)
    if way == "original":
        return {"accuracy": accuracy(model, tested), "bytes": checkpoint_bytes(model)}
    if way in PEERS:
        return PEERS[way](model, w, a, seen.inputs, tested)
    steps = calibrated(w, a) if way == "calibrated" else globals()[way](w, a, epochs)
    source = smelt.Source.of(model, "_cifar:build", {"blocks": _cifar.DEPTH[name]})
    start = time.perf_counter()
    job = smelt.Job(data=smelt.Data(train=seen), teacher=model, seed=seed, latency=False)
    found = smelt.compress(source, {"steps": steps}, job)
    took = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        size = found.save(Path(scratch) / "model.smelt")
        loaded = smelt.load(Path(scratch) / "model.smelt", into=_cifar.build(_cifar.DEPTH[name]))
    return {"accuracy": accuracy(loaded.eval(), tested), "bytes": size, "seconds": took}


def minmax(model: nn.Module, w: int, a: int, images: Tensor, test: Batches) -> dict[str, float]:
    """Batch norms folded, then weights per channel and inputs per tensor to nearest over all their range, by torch."""
    for parent in list(model.modules()):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(parent, norm):
                fused = nn.utils.fusion.fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm))
                setattr(parent, conv, fused)
                setattr(parent, norm, nn.Identity())
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    ends = {path: [0.0, 0.0] for path in layers}

    def see(path: str, x: Tensor) -> None:
        ends[path] = [min(ends[path][0], float(x.min())), max(ends[path][1], float(x.max()))]

    hooks = [m.register_forward_pre_hook(lambda m, x, p=p: see(p, x[0])) for p, m in layers.items()]
    with torch.no_grad():
        for part in images.split(BATCH):
            model(part)
        for hook in hooks:
            hook.remove()
        for path, layer in layers.items():
            bits, most = (8, 255) if path in EDGES else (w, 2**a - 1)
            top = 2 ** (bits - 1) - 1
            scale = layer.weight.flatten(1).abs().amax(1) / top
            zeros = torch.zeros(len(scale), dtype=torch.int32)
            layer.weight.copy_(torch.fake_quantize_per_channel_affine(layer.weight, scale, zeros, 0, -top, top))
            low, high = ends[path]
            step = (high - low) / most
            given = (step, round(-low / step), 0, most)
            layer.register_forward_pre_hook(lambda m, x, g=given: torch.fake_quantize_per_tensor_affine(x[0], *g))
    return {"accuracy": accuracy(model, test)}


def onnx_runtime(model: nn.Module, w: int, a: int, images: Tensor, test: Batches, method: str) -> dict[str, float]:
    """Its static quantization, weights per channel, inputs unsigned; run by its integer kernels."""
    import onnxruntime
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images.split(BATCH))

        def get_next(self) -> Any:
            part = next(self.left, None)
            return None if part is None else {"x": part.numpy()}

    assert (w, a) == (8, 8)
    with tempfile.TemporaryDirectory() as scratch:
        plain, ready, final = (str(Path(scratch) / f"{name}.onnx") for name in ("plain", "ready", "final"))
        axes = {"x": {0: "n"}}
        torch.onnx.export(model, (images[:1],), plain, dynamo=False, input_names=["x"], dynamic_axes=axes)
        quant_pre_process(plain, ready)
        kinds = {"activation_type": ort.QuantType.QUInt8, "weight_type": ort.QuantType.QInt8, "per_channel": True}
        ort.quantize_static(ready, final, Reader(), calibrate_method=ort.CalibrationMethod[method], **kinds)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(final, options, providers=["CPUExecutionProvider"])
        size = Path(final).stat().st_size
    right = 0
    for x, y in test:
        (out,) = session.run(None, {"x": x.numpy()})
        right += int((torch.from_numpy(out).argmax(1) == y).sum())
    return {"accuracy": 100 * right / test.samples, "bytes": size}


ONNX = {f"ONNX Runtime, {method}": partial(onnx_runtime, method=method) for method in ("MinMax", "Entropy")}
PEERS: dict[str, Any] = {"minmax": minmax} | ONNX
POINTS = {(8, 8): 0.1, (4, 8): 0.3, (4, 4): 1.0}  # and how many points may be lost by calibration
TRAINED = {(4, 4): 0.0, (2, 2): 1.5}
TUNED = 10  # times that the images are seen


def estimate(cells: list[dict[str, Any]]) -> float:
    """Seconds of a cell, on average."""
    took = []
    for one in cells:
        each = 0.002 if one["w"] == 32 else 0.005
        learning = one["images"] * one["epochs"] * each if one["way"] in ("trained", "tuned") else 20
        took.append((learning + (5 if one["test"] else 20)) * (1 if one["name"] == "ResNet-20" else 3))
    return sum(took) / len(took)


def grid(args: Any, folder: Path) -> list[dict[str, Any]]:
    def cells(name: str, way: str, points: Any, images: int, epochs: int = 1, seeds: Any = (0,)) -> list[Any]:
        given = {"name": name, "way": way, "images": images, "epochs": epochs, "folder": str(folder)}
        return [
            given | {"w": w, "a": a, "seed": s, "test": 1000 if args.quick else None} for w, a in points for s in seeds
        ]

    peers = ["minmax"]
    if find_spec("onnxruntime") and find_spec("onnx"):
        peers += ONNX
    else:
        print("missing peer: onnxruntime; pip install -r benchmarks/requirements.txt")
    if args.quick:
        found = cells("ResNet-20", "original", [(32, 32)], 1) + cells("ResNet-20", "minmax", [(4, 4)], 256)
        return [*found, *cells("ResNet-20", "calibrated", [(4, 4)], 256)]
    found, seeds = [], range(5 if args.long else 2)
    epochs = 40 if args.long else EPOCHS
    for name in _cifar.WEIGHTS:
        found += cells(name, "original", [(32, 32)], 1)
        many = seeds if name == "ResNet-20" else [0]
        for peer in peers:
            points = [(8, 8)] if peer in ONNX else POINTS
            found += cells(name, peer, points, CALIBRATED, seeds=many)
        found += cells(name, "calibrated", POINTS, CALIBRATED, seeds=many)
        found += cells(name, "tuned", [(4, 4)], CALIBRATED, TUNED, many)
        if name == "ResNet-20" or args.long:
            found += cells(name, "trained", [(32, 32), *TRAINED], IMAGES, epochs, many if args.long else [0])
    return found


def rows(cells: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[Row]:
    points: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one, run in zip(cells, runs, strict=True):
        key = (one["name"], one["w"], one["a"], one["way"], one["images"], one["epochs"])
        points.setdefault(key, []).append(run)
    mean = {key: statistics.mean(run["accuracy"] for run in several) for key, several in points.items()}
    found: list[Row] = []
    for (name, w, a, way, images, epochs), several in points.items():
        key = (name, w, a, way, images, epochs)
        base = mean[name, 32, 32, "original", 1, 1]
        label = f"{name}, fp32" if w == 32 else f"{name}, W{w}A{a}, {way}"
        if way in ("tuned", "trained"):
            label += f", {images:,} images x {epochs}"
            base = mean.get((name, 32, 32, way, images, epochs), base)
        if a < 32 and way not in ONNX:
            label += ", inputs simulated"
        limit = {"calibrated": POINTS, "tuned": POINTS, "trained": TRAINED}.get(way, {}).get((w, a))
        best = max((mean[k] for k in points if k[:3] == key[:3] and k[3] in PEERS), default=None)
        rival = best is not None and way in ("calibrated", "tuned")
        target = None if limit is None else f">= {base - limit:.2f} (fp32 - {limit:g})"
        peer = ("best peer", round(best, 2)) if rival and best is not None else (None, None)
        found.append(Row(f"{label}, accuracy", round(mean[key], 2), "%", *peer, target))
        if len(several) > 1:
            spread = statistics.stdev(run["accuracy"] for run in several)
            found.append(Row(f"{label}, standard deviation of {len(several)} draws", round(spread, 2), "points"))
        if "bytes" in several[0]:
            size = statistics.mean(run["bytes"] for run in several)
            theirs = points[name, 32, 32, "original", 1, 1][0]["bytes"]
            found.append(
                Row(f"{label}, file", size, "bytes", None if w == 32 else "fp32 checkpoint", theirs if w < 32 else None)
            )
        if "seconds" in several[0]:
            took = statistics.mean(run["seconds"] for run in several)
            found.append(Row(f"{label}, took", round(took, 1), "s"))
    return found


def main() -> int:
    return _cifar.run("quantize_cifar", __doc__ or "", grid, cell, rows, estimate, network)


if __name__ == "__main__":
    sys.exit(main())
