"""`smelt export`, `smelt bench` and `smelt convert`."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.text import Text
from torch import Tensor

from smelt._cli_options import (
    MODEL,
    WEIGHTS,
    console,
    data_of,
    data_options,
    is_file,
    metric_of,
    metric_option,
    positive,
    print_json,
    source_of,
)
from smelt.bench import TOLERANCE, bench
from smelt.convert import convert
from smelt.core.errors import RecipeError
from smelt.core.export import export, format_of, formats
from smelt.core.output import check_output
from smelt.core.runtime import runtime, sized
from smelt.core.settings import build
from smelt.formats.keras import MODES
from smelt.measure import examples
from smelt.reports import bench as report
from smelt.reports import html, terminal
from smelt.reports._methods import settings_of
from smelt.reports._stages import times

DOES = {
    "export": "write a model in a format that a runtime reads, as it is stored",
    "convert": "write a Keras file or a SavedModel as .tflite, and measure both",
    "bench": "run files beside the original in every runtime that is installed, and warn of what is slower or differs",
}
EXAMPLES = {
    "export": """examples:
  smelt export                                            # the formats
  smelt export --to onnx                                  # the settings of one
  smelt export lenet.smelt --to onnx --data mnist.npz     # writes lenet.onnx
  smelt export lenet.smelt --to onnx --data mnist.npz --set activations=static -o lenet-int8.onnx
  smelt export lenet --weights lenet.pt --to openvino --shape 1,28,28""",
    "convert": """examples:
  smelt convert net.keras -o net.tflite --mode float16
  smelt convert saved_model -o net.tflite --mode int8 --data my_data:load --report net.html

int8 calibrates on the training split. Data are as the model takes them: images have their channels last.""",
    "bench": """examples:
  smelt bench lenet.smelt lenet.onnx --data mnist.npz
  smelt bench lenet.onnx lenet.xml --original lenet --weights lenet.pt --data mnist.npz --batch 1,32 --threads 1,2
  smelt bench lenet.smelt --shape 1,28,28 --runtimes eager,compiled --json
  smelt bench *.onnx --data mnist.npz --plot bench.html

The original of a .smelt file is made by the builder that it names, with random weights, and is only timed; outputs are
compared with those of --original, else of the first file. Latency: one process, all sides in turn.""",
}


def export_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="FILE", nargs="?", help=f"a .smelt file, or another model: {MODEL}")
    p.add_argument("--to", metavar="NAME", help="the format; without FILE its settings are shown")
    p.add_argument("-o", "--output", type=Path, metavar="OUT", help="default: in this folder, named as FILE")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the format, as in a recipe"
    )
    p.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="samples in the example that is followed: 1 fixes that (the first batch of the data; 2 with --shape)",
    )
    p.add_argument("--force", action="store_true", help="replace a file that exists")
    p.add_argument("--weights", metavar="FILE", help=WEIGHTS)
    _inputs(p)


def convert_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="FILE", type=Path, help="a .keras or .h5 file, or the folder of a SavedModel")
    p.add_argument("-o", "--output", required=True, type=Path, metavar="OUT.tflite", help="the file to write")
    p.add_argument("--mode", default="int8", help=f"{', '.join(MODES)} (default: int8)")
    p.add_argument("--report", type=Path, metavar="PAGE.html", help="also write a page with everything measured")
    p.add_argument("--force", action="store_true", help="replace files that exist")
    metric_option(p)
    data_options(p)


def bench_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("files", metavar="FILE", nargs="+", type=Path, help=".smelt files, and what smelt export writes")
    p.add_argument("--original", metavar="MODEL", help="the model before it was compressed; default: see below")
    p.add_argument("--weights", metavar="FILE", help=f"of the original, {WEIGHTS}")
    p.add_argument("--runtimes", type=_names, default=(), metavar="LIST", help="such as eager,onnxruntime (all)")
    p.add_argument("--batch", type=_numbers, default=(1,), metavar="LIST", help="samples that are run at once (1)")
    p.add_argument("--threads", type=_numbers, default=(1,), metavar="LIST", help="of each runtime (1)")
    p.add_argument("--repeats", type=positive, default=30, metavar="N", help="runs of each that are timed (30)")
    p.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="DB", help=f"SQNR below which is warned ({TOLERANCE:g})"
    )
    p.add_argument("--no-memory", action="store_true", help="do not measure memory, for which each is run once more")
    p.add_argument("--plot", type=Path, metavar="PAGE.html", help="also write a page with plots")
    p.add_argument("--force", action="store_true", help="replace a page that exists")
    metric_option(p)
    _inputs(p)


def _inputs(p: argparse.ArgumentParser) -> None:
    data_options(p)
    p.add_argument("--shape", type=_numbers, metavar="LIST", help="of one sample, such as 3,224,224: instead of data")


def _export(args: argparse.Namespace) -> None:
    if args.model is None:
        return _formats(args)
    if args.to is None:
        raise RecipeError(f"--to is needed: one of {', '.join(formats())}")
    kind, given = format_of(args.to), dict(map(_setting, args.set))
    build(kind, given, args.to)
    name = Path(args.model if is_file(args.model) else args.model.partition("(")[0].rpartition(":")[2]).stem
    path = args.output or Path(f"{name}{kind.suffix or f'-{args.to}'}")
    source = source_of(args.model, args.weights, args)
    assert source.module is not None
    data, example = data_of(args), _example(args, args.batch or 2)
    if args.batch and example is None and data is not None:
        example = sized(examples(data), args.batch)
    with _quiet(args.debug):
        made = export(
            source.module, args.to, path, example=example, data=data, force=args.force, seed=args.seed, **given
        )
    if args.json:
        print_json({**asdict(made), "path": str(made.path), "runtimes": kind.runtimes})
        return
    out = console()
    for note in made.notes:
        out.print(Text(f"- {note}", "dim"))
    out.print(Text(f"wrote {made.path}: {made.bytes:,} bytes"))
    for runner in kind.runtimes[:1]:
        why = runtime(runner).missing()
        out.print(Text(f"run it in {runner}" + (f", which is missing here: {why}" if why else ": smelt bench"), "dim"))


def _formats(args: argparse.Namespace) -> None:
    """All formats, or the settings of one."""
    chosen = [args.to] if args.to else formats()
    found: dict[str, dict[str, Any]] = {}
    for name in chosen:
        kind = format_of(name)
        does = (kind.__doc__ or "").strip().split("\n\n")[0]
        found[name] = {
            "does": " ".join(does.split()),
            "suffix": kind.suffix or "a folder",
            "runtimes": list(kind.runtimes),
            "missing": kind.missing(),
            "settings": settings_of(kind),
        }
    if args.json:
        print_json(found)
        return
    out = console()
    for name, one in found.items():
        card = {"does": one["does"], "writes": one["suffix"], "runs in": ", ".join(one["runtimes"])}
        out.print(terminal.method_card(name, {**card, "missing": one["missing"] or ""}))
        if args.to and one["settings"]:
            out.print(terminal.settings_table(one["settings"]))
    if not args.to:
        out.print(Text("smelt export --to NAME shows the settings of one", "dim"))


def _convert(args: argparse.Namespace) -> None:
    if args.report:
        check_output(args.report, args.force)
    with _quiet(args.debug):
        found = convert(
            args.model,
            args.output,
            data=data_of(args),
            mode=args.mode,
            metric=metric_of(args.metric),
            force=args.force,
        )
    if args.report:
        html.write(found, args.report, title=f"{args.model.name}, {args.mode}", force=args.force)
    if args.json:
        print_json({"file": str(args.output), "ratio": found.ratio(), **found.to_plain()})
        return
    out = console()
    out.print(terminal.stage_table(found, out.width))
    out.print(Text(f"wrote {args.output}: {times(found.ratio())} smaller than {args.model}"))


def _bench(args: argparse.Namespace) -> None:
    if args.plot:
        check_output(args.plot, args.force)
    if args.weights and not args.original:
        raise RecipeError("--weights are those of the original; name it: --original MODEL")
    original = source_of(args.original, args.weights, args, "original") if args.original else None
    data, inputs = data_of(args), _example(args, 1)
    with terminal.TerminalProgress() as progress, _quiet(args.debug):
        found = bench(
            args.files,
            original=original,
            data=data,
            inputs=inputs,
            metric=metric_of(args.metric),
            runtimes=args.runtimes,
            batches=args.batch,
            threads=args.threads,
            repeats=args.repeats,
            memory=not args.no_memory,
            tolerance=args.tolerance,
            device=args.device,
            trust=args.trust,
            progress=progress,
        )
    if args.plot:
        title = f"{', '.join(path.name for path in args.files)}: speed, size and outputs"
        report.write(found, args.plot, title=title, force=args.force)
    if args.json:
        print_json(found.to_plain())
        return
    out = console()
    out.print(report.table(found))
    if args.plot:
        out.print(Text(f"wrote {args.plot}"))


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Exporters and runtimes warn of themselves; what concerns the user is in our notes."""
    if debug:
        yield
        return
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _example(args: argparse.Namespace, batch: int) -> Tensor | None:
    if args.shape is None:
        return None
    if args.data:
        raise RecipeError("--shape is for want of data; take it out, or --data")
    return torch.randn(batch, *args.shape, generator=torch.Generator().manual_seed(args.seed))


def _setting(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set {text!r} is not KEY=VALUE")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text!r}: the value cannot be read") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,8") from None
    return found


VERBS = {"export": _export, "convert": _convert, "bench": _bench}
OPTIONS = {"export": export_options, "convert": convert_options, "bench": bench_options}
