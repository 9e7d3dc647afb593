"""The presets of `recipes/` where they are deployed: each file that they lead to, loaded again in its runtime.

    SMELT_DATA=... python benchmarks/presets.py

    digits       a residual network that learnt scikit-learn's digits: 899 test digits
    ResNet-20    trained on CIFAR-10 as JPEG: 2,000 test images; 5,000 training images without labels for `recover`
    llama-bytes  a byte-level Llama: perplexity over 64 windows of 256 bytes

Milliseconds are CPU time of one sample on one thread, medians of runs in turn with those of the original in the same
runtime, exported in fp32.  What the microcontroller preset writes runs in TFLite Micro's interpreter, too.  Language
models are read again by transformers, from the very files.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import _cifar
import _llama
import _torchvision
import numpy as np
import torch
from _bench import CACHE, Row, arguments, conditions, data_folder, finish, run_cells
from torch import Tensor, nn

import smelt
from smelt.bench import bench
from smelt.core.bench import Bench, Side
from smelt.core.data import Batches
from smelt.core.errors import SmeltError
from smelt.core.export import export, format_of
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step
from smelt.core.runtime import needs, open_session, runtime
from smelt.core.source import Source
from smelt.core.train import Train
from smelt.demo import RECIPES
from smelt.measures.accuracy import evaluate
from smelt.measures.bytes import checkpoint_bytes
from smelt.models._open import open_model
from smelt.train.loop import Loop, fit

STATIC = {"activations": "static"}
LIMIT = 256_000  # bytes that a microcontroller's file may have
TRAIN, TEST = 5000, 2000
MICRO = "TFLite Micro"
TEXT = "llama-bytes"
PACKAGES = (
    *("onnxruntime", "openvino", "ai-edge-litert", "executorch", "tflite-micro"),
    *("transformers", "compressed-tensors", "gguf"),
)


@dataclass(frozen=True)
class Preset:
    """ways: formats with their settings; reads: what must be importable to load what a language model is written as."""

    ways: tuple[tuple[str, dict[str, Any]], ...]
    nets: tuple[str, ...] = ("digits", "ResNet-20")
    reads: tuple[str, ...] = ()


PRESETS = {
    "mobile": Preset((("litert", STATIC), ("executorch", STATIC))),
    "microcontroller": Preset((("litert", {"integer": True}),), ("digits",)),
    "server-cpu": Preset((("onnx", STATIC), ("openvino", STATIC))),
    "realtime": Preset((("onnx", STATIC), ("executorch", STATIC))),
    "gpu": Preset((("compressed-tensors", {}),), (TEXT,), ("transformers", "compressed_tensors")),
    "language-model": Preset((("gguf", {}),), (TEXT,), ("transformers", "gguf")),
}
QUICK = "server-cpu"


def learnt(quick: bool) -> Source:
    """A residual network that learnt digits, kept between runs."""
    train = Train(epochs=3 if quick else 20, lr=3e-3, optimizer="adamw", weight_decay=0.05, keep="last")
    path = CACHE / f"resnet_digits-{train.epochs}.smelt"
    torch.manual_seed(0)
    model, builder, given = open_model("resnet_digits")
    if not path.exists():
        fit(model, Step(train), Loop(smelt.open_data("digits"), seed=0), Progress())
        CACHE.mkdir(parents=True, exist_ok=True)
        smelt.save(model.eval(), path, force=True)
    return Source.of(smelt.load(path, into=model), builder, given)


def _network(net: str, quick: bool, folder: str) -> tuple[nn.Module | Source, Batches, Batches]:
    """A trained network; what it may learn from, without labels; what it is judged by."""
    if net == "digits":
        data = smelt.open_data("digits")
        assert isinstance(data.train, Batches) and isinstance(data.test, Batches)
        return learnt(quick), Batches(data.train.inputs, None, 64, shuffle=True, seed=0), data.test
    data = _cifar.data(Path(folder), CACHE, 0, TRAIN, TEST)
    assert isinstance(data.train, Batches) and isinstance(data.test, Batches)
    moved = data.train.transform
    return _cifar.network(net, Path(folder)), Batches(data.train.inputs, None, 128, True, 0, moved), data.test


def image_cell(preset: str, net: str, recipe: dict[str, Any], formats: list[str], quick: bool, folder: str) -> Any:
    """A preset on a network: its file, and what is exported from the file, each loaded again and run."""
    model, train, test = _network(net, quick, folder)
    one = test.inputs[:1]
    # What `of: milliseconds` counts is a forward of the first batch: here of one sample.
    job = smelt.Job(data=smelt.Data(train=train, valid=[(one, test.labels[:1])]), latency=False, threads=1)
    result = smelt.compress(model, recipe, job)
    module = model.module if isinstance(model, Source) else model
    assert module is not None
    found: dict[str, Any] = {"original": checkpoint_bytes(module), "notes": {"recipe": list(result.report.notes)}}
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / "out.smelt"]
        result.save(files[0])
        again = smelt.load(files[0], into=copy.deepcopy(module))
        for to, settings in PRESETS[preset].ways:
            if to in formats:
                path = Path(scratch) / f"out{format_of(to).suffix}"
                try:
                    made = export(again, to, path, example=one, data=train, **settings)
                except SmeltError as error:
                    found["notes"][to] = [f"not written: {error}"]
                    continue
                found["notes"][to] = list(made.notes)
                files.append(path)
        names = ["eager", *(format_of(to).runtimes[0] for to in formats)]
        sides = bench(
            files, original=model, data=smelt.Data(test=test), inputs=one, runtimes=names, repeats=60, memory=False
        )
        found["sides"] = [_plain(sides, side) for side in sides]
        found["notes"]["bench"] = [text.replace(f"{scratch}/", "") for text in sides.warnings]
        if preset == "microcontroller" and len(files) > 1:
            found["integers"] = _integers(files[1])
            with suppress(ImportError):
                found["micro"] = _micro(files[1], test)
    return found


def _plain(sides: Bench, side: Side) -> dict[str, Any]:
    timed = side.at(1, 1)
    return {
        **{"file": Path(side.file).suffix or side.file, "runtime": side.runtime, "bytes": side.bytes},
        **{"accuracy": side.metric, "ms": sides.cost(timed).median if timed else None, "failed": side.failed},
    }


def _integers(path: Path) -> list[str]:
    """Types of the tensors that a `.tflite` file holds or computes, where they are no integers."""
    session: Any = open_session("litert", path)
    kinds = {np.dtype(detail["dtype"]).name for detail in session.interpreter.get_tensor_details()}
    return sorted(kind for kind in kinds if "int" not in kind)


def _micro(path: Path, test: Batches) -> dict[str, float]:
    """Accuracy in the interpreter of microcontrollers, and the least kB of memory that it needs to run the file."""
    from tflite_micro.python.tflite_micro import runtime as micro

    def started(size: int) -> Any:
        with suppress(Exception):  # too small a memory
            return micro.Interpreter.from_file(str(path), arena_size=size)
        return None

    low, high = 0, 4096  # kB
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if started(middle * 1000) else (middle, high)
    ready = started(high * 1000)
    ends = [detail["quantization_parameters"] for detail in (ready.get_input_details(0), ready.get_output_details(0))]
    (scale, zero), (step, middle) = ((float(e["scales"][0]), int(e["zero_points"][0])) for e in ends)

    class Micro(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = []
            for image in x.split(1):
                codes = torch.round(image / scale + zero).clamp(-128, 127).to(torch.int8)
                ready.set_input(codes.numpy(), 0)
                ready.invoke()
                rows.append(torch.from_numpy((ready.get_output(0).astype(np.float32) - middle) * step))
            return torch.cat(rows)

    return {"accuracy": evaluate(Micro(), test, "accuracy"), "kB": high}


def text_cell(preset: str, net: str, recipe: dict[str, Any], formats: list[str], quick: bool, folder: str) -> Any:
    """A preset on a language model: its file, and what transformers makes of what is exported from the file."""
    _torchvision.prepare()
    (to, settings), source = PRESETS[preset].ways[0], Path(folder)
    model = _llama.read(source)
    found: dict[str, Any] = {"original": checkpoint_bytes(model), "before": _llama.perplexity(model, source)}
    data = smelt.Data(train=[(part, None) for part in _llama.calibration(source, 128, 0).split(8)])
    result = smelt.compress(model, recipe, smelt.Job(data=data, metric="loss", latency=False))
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch)
        found["smelt"] = result.save(there / "out.smelt")
        again = smelt.load(there / "out.smelt", into=_llama.read(source))
        found["after"] = _llama.perplexity(again, source)
        path = there / f"out{format_of(to).suffix}"
        made = export(again, to, path, source=folder, **settings)
        found["file"] = path.stat().st_size if path.is_file() else (path / "model.safetensors").stat().st_size
        found["notes"] = {"recipe": list(result.report.notes), to: list(made.notes)}
        found["runtime"] = _llama.perplexity(_opened(path), source)
    return found


def _opened(path: Path) -> nn.Module:
    """A written file or folder as transformers reads it; ids -> logits."""
    from transformers import AutoModelForCausalLM

    given = {} if path.is_dir() else {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path if path.is_dir() else path.parent, dtype=torch.float32, **given)

    class Logits(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = model(ids).logits
            return found

    return Logits()


def cells_of(quick: bool, root: Path | None, text: Path | None) -> list[dict[str, Any]]:
    """Presets on networks, in the formats that can be written and run here; what is missing is said."""
    made = []
    for name in [QUICK] if quick else PRESETS:
        preset = PRESETS[name]
        formats = [to for to, _ in preset.ways if _able(name, to, preset)]
        folders = {"digits": "", "ResNet-20": None if quick or root is None else str(root), TEXT: text and str(text)}
        common = {"recipe": Recipe.of(RECIPES / f"{name}.yaml").to_plain(), "formats": formats, "quick": quick}
        made += [{"preset": name, "net": net, "folder": folders[net], **common} for net in preset.nets if formats]
    return [cell for cell in made if cell["folder"] is not None]


def _able(name: str, to: str, preset: Preset) -> bool:
    kind = format_of(to)
    runs = [runtime(one).missing() for one in kind.runtimes[:1]]
    whys = [why for why in (kind.missing(), *runs, needs(preset.reads, "llm")) if why]
    if whys:
        print(f"{name}: {to} is left out: {whys[0]}")
    return not whys


def image_rows(cell: dict[str, Any], found: dict[str, Any]) -> list[Row]:
    made, named = [], f"{cell['preset']}, {cell['net']}"
    sides, fp32 = found["sides"], found["original"]
    limit = f"< {LIMIT:,}" if cell["preset"] == "microcontroller" else None
    plain = next(side for side in sides if side["file"] == "original")
    for side in (side for side in sides if side["file"] != "original"):
        where = f"{named}, {side['file']} in {side['runtime']}"
        if side["failed"]:
            made.append(Row(f"{where}: did not run, {side['failed']}", None))
            continue
        target = limit if side["file"] != ".smelt" else None
        made.append(Row(f"{where}: file", side["bytes"], "bytes", "fp32", fp32, target))
        made.append(Row(where, _short(side["accuracy"]), "%", "original", _short(plain["accuracy"])))
        if side["file"] != ".smelt":
            same = [s for s in sides if s["file"] == "original" and s["runtime"] == side["runtime"]]
            before = same[0]["ms"] if same else None
            made.append(Row(where, _short(side["ms"], 3), "ms", "original there", _short(before, 3)))
    made.append(Row(f"{named}, original in eager", _short(plain["ms"], 3), "ms"))
    if "integers" in found:
        made.append(Row(f"{named}: kinds of tensors that are no integers", len(found["integers"]), "", target="0"))
    if "micro" in found:
        made.append(Row(f"{named}, .tflite in {MICRO}", _short(found["micro"]["accuracy"]), "%"))
        made.append(Row(f"{named}, .tflite in {MICRO}: memory", found["micro"]["kB"], "kB"))
    elif "integers" in found:
        print(f"{named}: {MICRO} is left out: tflite_micro is not installed; pip install tflite-micro")
    return made


def text_rows(cell: dict[str, Any], found: dict[str, Any]) -> list[Row]:
    named, to = f"{cell['preset']}, {cell['net']}", cell["formats"][0]
    before = found["before"]
    made = [Row(f"{named}, .smelt: file", found["smelt"], "bytes", "fp32", found["original"])]
    made.append(Row(f"{named}, .smelt: perplexity", _short(found["after"], 4), "", "original", _short(before, 4)))
    made.append(Row(f"{named}, {to}: file", found["file"], "bytes", "fp32", found["original"]))
    where = f"{named}, {to} in transformers: perplexity"
    made.append(Row(where, _short(found["runtime"], 4), "", "original", _short(before, 4)))
    made.append(Row(f"{where}, loss", _short(100 * (found["runtime"] / before - 1)), "%", target="<= 1"))
    return made


def _short(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def main() -> int:
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    print(conditions(), *_versions(), sep=", ")
    root, text = (None, None) if args.quick else (_cifar.root(), data_folder(TEXT))
    cells = cells_of(args.quick, root, text)
    rows: list[Row] = []
    kinds: Sequence[tuple[str, bool, Callable[..., Any], Any, float]] = (
        ("presets, images", False, image_cell, image_rows, 20 if args.quick else 120),
        ("presets, text", True, text_cell, text_rows, 60),
    )
    for name, is_text, cell, rows_of, seconds in kinds:
        chosen = [one for one in cells if (one["net"] == TEXT) == is_text]
        if not chosen:
            continue
        if any(one["net"] == "digits" for one in chosen):
            learnt(args.quick)
        runs = run_cells(name, cell, chosen, jobs=1, fresh=args.fresh, seconds=seconds, apart=True)
        for one, found in zip(chosen, runs, strict=True):
            rows += rows_of(one, found)
            for what, notes in found["notes"].items():
                for note in notes:
                    print(f"{one['preset']}, {one['net']}, {what}: {note}")
    finish(rows, args.json)
    return 0


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
