"""What the commands of the command line share: their parser, their options, and where they print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from smelt.core import shelf
from smelt.core.data import Data
from smelt.core.errors import DataError, ModelError, RecipeError
from smelt.core.job import check_device
from smelt.core.named import function_at
from smelt.core.source import Source
from smelt.core.store import store_of
from smelt.data._read import open_data
from smelt.formats import smelt as smelt_file
from smelt.measures.accuracy import METRICS, named
from smelt.models._open import PICKLES, open_model

WEIGHTS = "a state dict: .pt, .pth, .th or .safetensors"
MODEL = "a built-in name such as lenet or 'lenet(hidden=100)', module:function, or a .smelt file"


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; see {self.prog} --help")


def model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--weights", metavar="FILE", help=WEIGHTS)
    data_options(p)
    metric_option(p)
    p.add_argument("--threads", type=positive, metavar="N", help="threads of the latency measurement")
    p.add_argument("--no-latency", action="store_true", help="do not time forward passes")


def data_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--trust", action="store_true", help="run the function that a .smelt file names as its builder")
    p.add_argument("--data", metavar="DATA", help="digits, a .npz file, a folder of images, or module:function")
    p.add_argument("--batch-size", type=positive, metavar="N", help="samples per batch")
    p.add_argument("--image-size", type=positive, metavar="N", help="pixels to which a folder's images are scaled")
    p.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default: 0)")
    p.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")


def metric_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--metric", default="accuracy", help=f"{', '.join(METRICS)}, or module:function (default: accuracy)")


def device(text: str) -> str:
    try:
        check_device(text)
    except ModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return number


def console(file: Any = None) -> Console:
    """On stdout; where that is no terminal, wide enough for the tables."""
    made = Console(file=file or sys.stdout, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 120
    return made


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, default=str))


def say(text: str) -> None:
    print(f"smelt: {text}", file=sys.stderr)


def is_file(spec: str) -> bool:
    return spec.endswith(".smelt") or Path(spec).is_file()


def source_of(spec: str, weights: str | None, args: argparse.Namespace, role: str = "model") -> Source:
    """What a text names, with its module, on the device."""
    if Path(spec).suffix in (*PICKLES, ".safetensors"):
        raise ModelError(f"{spec!r} holds weights; name the model too: lenet --weights {spec}")
    if is_file(spec):
        if weights:
            raise ModelError(f"{spec!r} has its own weights; take --weights out, or name a builder")
        module = smelt_file.load(spec, trust=args.trust)
        held = store_of(module).source or Source()
        builder, arguments = held.builder, dict(held.arguments)
    else:
        torch.manual_seed(getattr(args, "seed", 0))
        module, builder, arguments = open_model(spec, weights)
        if not weights and builder in shelf.names("models"):
            if role != "model":
                option = "--teacher-weights" if role == "teacher" else "--weights"
                raise ModelError(f"{role} {spec!r} knows nothing yet; give {option}, or a .smelt file")
            say(f"note: {builder} has random weights; give --weights FILE")
    return Source.of(module.eval().to(args.device), builder, arguments)


def data_of(args: argparse.Namespace) -> Data | None:
    if args.data is None:
        return None
    return open_data(args.data, args.batch_size, args.seed, args.image_size)


def metric_of(text: str) -> str | Callable[..., Any]:
    if ":" in text:
        return function_at(text, DataError)
    named(text)
    return text
