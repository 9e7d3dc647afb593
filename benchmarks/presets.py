"""The presets of `recipes/`: what they were measured on, in the runtimes that they are for.

SMELT_DATA=... python benchmarks/presets.py
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _llama
import torch
from _bench import CACHE, Row, arguments, conditions, data_folder, finish, run_cells
from torch import Tensor, nn

import smelt
from smelt.bench import bench
from smelt.core.export import export, format_of
from smelt.core.progress import Progress
from smelt.core.recipe import Step
from smelt.core.source import Source
from smelt.core.train import Train
from smelt.measures.bytes import checkpoint_bytes
from smelt.models._open import open_model
from smelt.train.loop import Loop, fit

IMAGES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "mobile": [("litert", {"activations": "static"}), ("executorch", {"activations": "static"})],
    "microcontroller": [("litert", {"integer": True})],
    "server-cpu": [("onnx", {"activations": "static"}), ("openvino", {"activations": "static"})],
    "realtime": [("onnx", {"activations": "static"}), ("openvino", {"activations": "static"})],
}
TEXT = {"gpu": "compressed-tensors", "language-model": "gguf"}
RECIPES = Path(smelt.__file__).parent / "recipes"
PACKAGES = ("onnxruntime", "openvino", "ai-edge-litert", "executorch", "transformers", "compressed-tensors", "gguf")
LEARN = Train(epochs=20, lr=3e-3, optimizer="adamw", weight_decay=0.05, keep="last")


def trained() -> Source:
    """A residual network that learnt digits, kept between runs."""
    path = CACHE / "resnet_digits.smelt"
    if not path.exists():
        torch.manual_seed(0)
        model, builder, given = open_model("resnet_digits")
        fit(model, Step(LEARN), Loop(smelt.open_data("digits"), seed=0), Progress())
        model.eval()
        CACHE.mkdir(parents=True, exist_ok=True)
        smelt.save(model, path)
    model, builder, given = open_model("resnet_digits")
    return Source.of(smelt.load(path, into=model), builder, given)


def image_preset(name: str) -> dict[str, Any]:
    """A preset on the digits, its file, and what is exported from it."""
    data, source = smelt.open_data("digits"), trained()
    found: dict[str, Any] = {"original": checkpoint_bytes(source.module), "sides": []}
    with tempfile.TemporaryDirectory() as scratch:
        result = smelt.compress(source, RECIPES / f"{name}.yaml", smelt.Job(data=data, latency=False))
        found["before"], found["accuracy"] = result.report.value("accuracy", 0), result.report.value("accuracy")
        path = Path(scratch) / "out.smelt"
        found["bytes"] = result.save(path)
        model, files = smelt.load(path), []
        for to, settings in IMAGES[name]:
            if why := format_of(to).missing():
                print(f"{name}: {why}", file=sys.stderr)
                continue
            file = Path(scratch) / f"out{format_of(to).suffix}"
            notes = export(model, to, file, data=data, **settings).notes
            found["sides"].append({"format": to, "notes": list(notes)})
            files.append(file)
        made = bench(files, original=trained(), data=data, memory=False) if files else []
        for side in made:
            timed = side.at(1, 1)
            here = Path(side.file).name
            found.setdefault("runs", []).append(
                {"file": here, "runtime": side.runtime, "bytes": side.bytes, "accuracy": side.metric}
                | {"milliseconds": timed.timing.wall.median if timed else None, "failed": side.failed}
            )
    return found


def text_preset(name: str, folder: str) -> dict[str, Any]:
    """A preset on the model of bytes, its file, and the folder or file that is exported from it."""
    path, text = Path(folder), _llama.calibration(Path(folder), 128, 0)
    model = _llama.read(path)
    before = _llama.perplexity(model, path)
    data = smelt.Data([(part, _next(part)) for part in text.split(8)])
    size = checkpoint_bytes(model)
    result = smelt.compress(
        model, RECIPES / f"{name}.yaml", smelt.Job(data=data, metric="loss", loss=_loss, latency=False)
    )
    with tempfile.TemporaryDirectory() as scratch:
        found = {"original": size, "before": before, "bytes": result.save(Path(scratch) / "out.smelt")}
        made = export(result.model, TEXT[name], Path(scratch) / f"out{format_of(TEXT[name]).suffix}", source=folder)
    after = _llama.perplexity(result.model, path)
    return {**found, "perplexity": after, "format": TEXT[name], "exported": made.bytes, "notes": list(made.notes)}


def _next(ids: Tensor) -> Tensor:
    return ids.roll(-1, 1)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, :-1].flatten())


def main() -> int:
    args = arguments("The presets, measured where they are deployed.")
    folder = data_folder("llama-bytes")
    rows = []
    names = list(IMAGES)[:1] if args.quick else list(IMAGES)
    trained()
    for name, found in zip(
        names,
        run_cells("presets, digits", image_preset, [{"name": n} for n in names], jobs=1, fresh=args.fresh, seconds=60),
        strict=True,
    ):
        rows.append(Row(f"{name}: original", found["original"], "bytes"))
        rows.append(Row(f"{name}: accuracy", found["accuracy"], "%", "before", found["before"]))
        rows.append(Row(f"{name}: .smelt", found["bytes"], "bytes"))
        for run in found.get("runs", []):
            where = f"{name}: {run['file']}, {run['runtime']}"
            rows.append(Row(f"{where}: accuracy {run['failed'] or ''}", run["accuracy"], "%"))
            rows += [Row(where, run["bytes"], "bytes"), Row(where, run["milliseconds"], "ms")]
        for side in found["sides"]:
            print(f"{name}, {side['format']}: {'; '.join(side['notes'])}")
    if folder is not None and not args.quick:
        cells = [{"name": name, "folder": str(folder)} for name in TEXT]
        for cell, found in zip(
            cells, run_cells("presets, text", text_preset, cells, jobs=1, fresh=args.fresh, seconds=90), strict=True
        ):
            name = cell["name"]
            rows.append(Row(f"{name}: original", found["original"], "bytes"))
            rows.append(Row(f"{name}: perplexity", found["perplexity"], "", "before", found["before"]))
            rows += [
                Row(f"{name}: .smelt", found["bytes"], "bytes"),
                Row(f"{name}: {found['format']}", found["exported"], "bytes"),
            ]
            print(f"{name}, {found['format']}: {'; '.join(found['notes'])}")
    print(conditions(), *(f"{p} {version(p)}" for p in PACKAGES if _there(p)), sep=", ")
    finish(rows, args.json)
    return 0


def _there(package: str) -> bool:
    try:
        return bool(version(package))
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(main())
