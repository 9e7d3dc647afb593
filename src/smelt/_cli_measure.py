"""`smelt measure --sensitivity`."""

from __future__ import annotations

import argparse
from pathlib import Path

from smelt._cli_options import console, positive, print_json
from smelt.core.errors import RecipeError
from smelt.core.job import Job
from smelt.core.output import check_output
from smelt.core.source import Source
from smelt.reports import sensitivity as report
from smelt.reports import terminal
from smelt.sensitivity import VALUES, sensitivity

OPTIONS = ("method", "setting", "values", "on", "samples", "html", "cache", "no_cache", "force")
EXAMPLES = """
  smelt measure lenet --weights lenet.pt --data digits --sensitivity --html sensitivity.html
  smelt measure lenet.smelt --data digits --sensitivity --method quantize.affine --values 2,3,4,8 --samples 200"""


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--sensitivity",
        action="store_true",
        help="change each weight tensor alone, and measure each file: needs --data",
    )
    group = p.add_argument_group("with --sensitivity")
    group.add_argument("--method", metavar="NAME", help="what changes them, such as quantize.affine (prune.weights)")
    group.add_argument("--setting", metavar="NAME", help=f"the setting that varies (the first of {', '.join(VALUES)})")
    group.add_argument("--values", type=numbers, metavar="LIST", help="its values, such as 0.5,0.7,0.9")
    group.add_argument(
        "--on", action="append", metavar="PATTERN", help="tensors or modules, as in a recipe (all weights)"
    )
    group.add_argument("--samples", type=positive, metavar="N", help="use the first N samples (all)")
    group.add_argument("--html", type=Path, metavar="PAGE.html", help="also write a page with plots")
    group.add_argument("--force", action="store_true", help="replace a page that exists")
    group.add_argument("--cache", type=Path, metavar="DIR", help="where points are kept ($SMELT_CACHE, ~/.cache/smelt)")
    group.add_argument("--no-cache", action="store_true", help="keep nothing; an interrupted run starts anew")


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.5,0.9") from None


def check(args: argparse.Namespace) -> None:
    """Raise for options that only mean something with --sensitivity, and for a page that cannot be written."""
    given = [name for name in OPTIONS if getattr(args, name)]
    if given and not args.sensitivity:
        raise RecipeError(f"--{given[0].replace('_', '-')} goes with --sensitivity; see smelt measure --help")
    if args.html:
        check_output(args.html, args.force)


def run(args: argparse.Namespace, source: Source, job: Job) -> None:
    with terminal.TerminalProgress() as progress:
        found = sensitivity(
            source,
            job,
            args.method or "prune.weights",
            setting=args.setting,
            values=args.values or (),
            on=args.on or "*",
            limit=args.samples,
            progress=progress,
        )
    if args.html:
        report.write(
            found, args.html, title=f"{Path(args.model).name}, sensitivity to {found.method}", force=args.force
        )
    if args.json:
        print_json({"model": args.model, **found.to_plain()})
        return
    console().print(report.table(found))
