"""Training ResNet-20 on CIFAR-10 with saved activations in a few bits, against plain training and checkpointing.

    SMELT_DATA=... python benchmarks/activations.py

Memory: one training step at a time in a fresh process, float32, channels last: the bytes of activations that wait for
the backward pass (every storage once, without parameters), the rise of the peak resident set over what the process
takes with model and data (on a GPU: the peak of the allocator), and CPU seconds a step, the median of several.
MALLOC_MMAP_THRESHOLD_ makes glibc give every larger tensor back at once, for all alike: without it, what is free
between small tensors that stay counts as taken.  Checkpointing is torch.utils.checkpoint of each residual block.
Gradients: of one batch, against those of plain autograd, of one draw and of the mean of several.

Accuracy: the trained network is tuned on, five epochs of bfloat16 arithmetic, with the same images in the same order
with and without compression; the mean of the differences over seeds, and its 95 % interval by Student's t.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _cifar
import torch
from _bench import CACHE, Row, arguments, conditions, finish, run_cells
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import smelt
from smelt.core.data import Batches, evaluating
from smelt.core.method import make

BATCH = 128
TRAIN = {"epochs": 5, "lr": 0.01, "optimizer": "sgd", "weight_decay": 5e-4, "precision": "bfloat16", "keep": "last"}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "2 bits": {"bits": 2},
    "2 bits, adapted": {"bits": 2, "adapt": 200},
    "1 bit": {"bits": 1},
}
CACHES = {
    "without loss": None,
    "8 bits": {"quantize.affine": {"bits": 8, "symmetric": False, "per": "tensor", "zero": "whole"}},
    "4 bits": {"quantize.affine": {"bits": 4, "symmetric": False, "per": "tensor", "zero": "whole"}},
    "2 bits at random": {"quantize.stochastic": {"bits": 2}},
}
MAIN = "2 bits"  # what is trained with, besides plain; all ways with --long
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}  # 97.5 % points, by the number of differences


class Checkpointed(_cifar.ResNet):
    """Each block runs again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = checkpoint(block, x, use_reentrant=True) if torch.is_grad_enabled() else block(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def pieces(way: str) -> list[Any]:
    return [{"quantize.stochastic": {"at": "saved", **WAYS[way]}}] if WAYS[way] else []


def network(way: str, folder: Path) -> nn.Module:
    model = _cifar.network("ResNet-20", folder)
    if way == "checkpointing":
        model.__class__ = Checkpointed
    return model


def memory(way: str, batch: int, steps: int, draws: int, folder: str, device: str) -> Any:
    """What one way takes; in a process of its own, so that its peak is its own."""
    given = json.dumps({"way": way, "batch": batch, "steps": steps, "draws": draws, "folder": folder, "device": device})
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", given], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def one(way: str, batch: int, steps: int, draws: int, folder: str, device: str) -> dict[str, float]:
    torch.set_num_threads(1)
    model = network(way, Path(folder)).to(device).train()
    x, y = _cifar.read(Path(folder), "train", CACHE)
    x = _cifar.scaled(x[:batch]).contiguous(memory_format=torch.channels_last).to(device)
    y = y[:batch].to(device)

    def step(t: smelt.training, n: int) -> None:
        model.zero_grad(set_to_none=True)
        out = model(x[:n])
        t.loss(x[:n], out, hard=functional.cross_entropy(out, y[:n])).backward()
        t.step()

    found: dict[str, float] = {}
    with smelt.training(model, pieces(way)) as t:
        step(t, 8)
        before, took = peak(device, anew=True), []
        for _ in range(steps):
            start = time.process_time() if device == "cpu" else time.perf_counter()
            step(t, batch)
            took.append((time.process_time() if device == "cpu" else time.perf_counter()) - start)
        found |= {"peak": peak(device) - before, "seconds": statistics.median(took)}
        found["bytes"] = t.saved.bytes()[0] if pieces(way) else waiting(model, x, y)
        if draws and pieces(way):
            several = []
            for _ in range(draws):
                step(t, batch)
                several.append(gradient(model))
    if draws and pieces(way):
        with smelt.training(model) as t:
            step(t, batch)
        exact = gradient(model)
        mean = torch.stack(several).mean(0)
        found["error"] = float((several[0] - exact).norm() / exact.norm())
        found["error of the mean"] = float((mean - exact).norm() / exact.norm())
    return found


def peak(device: str, *, anew: bool = False) -> int:
    """Most bytes in memory, since it was last asked for anew (Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def waiting(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes of storages that autograd holds after a forward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}
    kept = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    del out
    return sum(held.values())


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def tuned(way: str, seed: int, images: int, epochs: int, test: int | None, folder: str) -> Any:
    """Accuracy after training on."""
    torch.set_num_threads(1)
    path = Path(folder)
    data = _cifar.data(path, CACHE, seed, images, test, BATCH)
    source = smelt.Source.of(network("plain", path), "_cifar:build", {"blocks": _cifar.DEPTH["ResNet-20"]})
    job = smelt.Job(data=smelt.Data(train=data.train), seed=seed, latency=False)
    start = time.process_time()
    step = {"train": TRAIN | {"epochs": epochs, "with": pieces(way)}}
    model = smelt.compress(source, {"steps": [step]}, job).model
    took = time.process_time() - start
    assert isinstance(data.test, Batches)
    right = 0
    with evaluating(model), torch.autocast("cpu", torch.bfloat16):
        for x, y in data.test:
            right += int((model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum())
    return {"accuracy": 100 * right / data.test.samples, "seconds": took}


def cached(images: int, folder: str) -> Any:
    """Features before the mean over pixels, in a file: bytes, and accuracy of the last layer on what is read again."""
    torch.set_num_threads(1)
    model = _cifar.network("ResNet-20", Path(folder))
    x, y = _cifar.read(Path(folder), "test", CACHE)
    with torch.no_grad():
        x = functional.relu(model.bn1(model.conv1(_cifar.scaled(x[:images]))))
        features = {"features": model.layer3(model.layer2(model.layer1(x)))}
    found: dict[str, Any] = {"plain": features["features"].numel() * 4}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        for name, codec in CACHES.items():
            path = Path(scratch) / "cache.smelt"
            size = smelt.save_file(features, path, codec, force=True)
            fixed = smelt.save_file(
                features, Path(scratch) / "fixed.smelt", codec, tail=[make("code.bits")], force=True
            )
            start = time.process_time()
            again = smelt.load_file(path)["features"]
            took = time.process_time() - start
            right = int((model.linear(again.mean((2, 3))).argmax(1) == y[:images]).sum())
            found[name] = {"bytes": size, "fixed": fixed, "accuracy": 100 * right / images, "seconds": took}
    return found


def estimate(cells: list[dict[str, Any]]) -> float:
    """Seconds of a cell, on average."""
    took = [cell["images"] * cell["epochs"] * (0.0012 if cell["way"] == "plain" else 0.0026) + 15 for cell in cells]
    return sum(took) / len(took)


def rows(
    cells: list[dict[str, Any]], runs: list[dict[str, Any]], sizes: dict[tuple[str, str], dict[str, float]]
) -> list[Row]:
    found = []
    for (device, way), one in sizes.items():
        plain, where = sizes[device, "plain"], "" if device == "cpu" else ", GPU"
        what = "allocator" if where else "resident set"
        target = ">= 12 times less" if way == MAIN else None
        times = round(plain["bytes"] / one["bytes"], 2)
        found.append(Row(f"{way}{where}: activations", round(one["bytes"] / 1e6, 2), "MB"))
        if way != "plain":
            found.append(
                Row(f"{way}{where}: activations, times less", times, "x", "plain, MB", plain["bytes"] / 1e6, target)
            )
        pair = ("plain", round(plain["peak"] / 1e6, 1)) if way != "plain" else (None, None)
        found.append(Row(f"{way}{where}: peak of the {what}, rise", round(one["peak"] / 1e6, 1), "MB", *pair))
        pair = ("plain", round(plain["seconds"], 3)) if way != "plain" else (None, None)
        found.append(Row(f"{way}{where}: a step", round(one["seconds"], 3), "s", *pair))
        for name in ("error", "error of the mean"):
            if name in one:
                found.append(Row(f"{way}{where}: gradient, relative {name}", round(100 * one[name], 2), "%"))
    points: dict[str, dict[int, dict[str, float]]] = {}
    for cell, run in zip(cells, runs, strict=True):
        points.setdefault(cell["way"], {})[cell["seed"]] = run
    for way, several in points.items():
        mean = statistics.mean(run["accuracy"] for run in several.values())
        took = statistics.mean(run["seconds"] for run in several.values())
        found.append(Row(f"{way}: accuracy, mean of {len(several)} seeds", round(mean, 3), "%"))
        found.append(Row(f"{way}: training and measuring", round(took, 1), "s"))
        if way != "plain":
            apart = [run["accuracy"] - points["plain"][seed]["accuracy"] for seed, run in several.items()]
            target = ">= -0.2" if way == MAIN else None
            found.append(Row(f"{way}: accuracy over plain", round(statistics.mean(apart), 3), "points", target=target))
            if len(apart) in STUDENT:
                half = STUDENT[len(apart)] * statistics.stdev(apart) / len(apart) ** 0.5
                found.append(Row(f"{way}: accuracy over plain, 95 % interval, +-", round(half, 3), "points"))
    return found


def at_rest(cache: dict[str, Any], images: int) -> list[Row]:
    found = []
    exact = cache["without loss"]["accuracy"]
    for name in CACHES:
        one = cache[name]
        label, read = f"features of {images:,} images, {name}", cache["plain"] / 1e6 / max(one["seconds"], 1e-9)
        times = [round(cache["plain"] / one[kind], 2) for kind in ("bytes", "fixed")]
        found.append(Row(f"{label}: times less than fp32", times[0], "x", "without entropy coding", times[1]))
        found.append(Row(f"{label}: accuracy on them", round(one["accuracy"], 2), "%", "fp32", round(exact, 2)))
        found.append(Row(f"{label}: read", round(read), "MB of fp32 a second"))
    return found


def main() -> int:
    args = arguments(__doc__ or "")
    folder = _cifar.root()
    if folder is None:
        return 4
    print(conditions())
    _cifar.read(folder, "train", CACHE)
    ways = ("plain", "checkpointing", MAIN) if args.quick else tuple(w for w in WAYS if args.long or "adapted" not in w)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    given = {"batch": 32, "steps": 1, "draws": 2} if args.quick else {"batch": 256, "steps": 5, "draws": 8}
    asked = [{"way": w, "device": d, "folder": str(folder), **given} for d in devices for w in ways]
    seconds = 8 if args.quick else 40
    measured = run_cells("memory", memory, asked, jobs=args.jobs, fresh=args.fresh, seconds=seconds)
    sizes = {(cell["device"], cell["way"]): found for cell, found in zip(asked, measured, strict=True)}
    images, epochs, test = (256, 1, 500) if args.quick else (50000 if args.long else 10000, 5, None)
    tried = ("plain", *([w for w in WAYS if WAYS[w]] if args.long else [MAIN]))
    seeds = range(1 if args.quick else 10 if args.long else 5)
    given = {"images": images, "epochs": epochs, "test": test, "folder": str(folder)}
    cells = [{"way": w, "seed": s, **given} for s in seeds for w in tried]
    runs = run_cells("accuracy", tuned, cells, jobs=args.jobs, fresh=args.fresh, seconds=estimate(cells))
    count = 500 if args.quick else 10000
    (cache,) = run_cells(
        "caches", cached, [{"images": count, "folder": str(folder)}], jobs=1, fresh=args.fresh, seconds=20
    )
    finish(rows(cells, runs, sizes) + at_rest(cache, count), args.json)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        with contextlib.redirect_stdout(sys.stderr):
            result = one(**json.loads(sys.argv[2]))
        print(json.dumps(result))
        sys.exit(0)
    sys.exit(main())
