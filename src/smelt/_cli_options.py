"""What the commands of the command line share: their parser, their options, and where they print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, NoReturn

from rich.console import Console

from smelt.core.errors import ModelError, RecipeError
from smelt.core.job import check_device
from smelt.measures.accuracy import METRICS

MODEL = "a built-in name such as lenet or 'lenet(hidden=100)', module:function, or a .smelt file"


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; see {self.prog} --help")


def model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("--weights", metavar="FILE", help="a state dict: .pt, .pth, .th or .safetensors")
    p.add_argument("--trust", action="store_true", help="run the function that a .smelt file names as its builder")
    p.add_argument("--data", metavar="DATA", help="digits, a .npz file, a folder of images, or module:function")
    p.add_argument("--batch-size", type=positive, metavar="N", help="samples per batch")
    p.add_argument("--image-size", type=positive, metavar="N", help="pixels to which a folder's images are scaled")
    p.add_argument("--metric", default="accuracy", help=f"{', '.join(METRICS)}, or module:function (default: accuracy)")
    p.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default: 0)")
    p.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    p.add_argument("--threads", type=positive, metavar="N", help="threads of the latency measurement")
    p.add_argument("--no-latency", action="store_true", help="do not time forward passes")


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
