"""`smelt pack` and `smelt unpack`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.text import Text

from smelt._cli_options import console, positive, print_json
from smelt.formats.pack import Packed, pack, unpack
from smelt.reports import terminal

DOES = {
    "pack": "pack .safetensors files without loss, read back and compared",
    "unpack": "restore what smelt pack packed, byte for byte",
}
EXAMPLES = {
    "pack": """examples:
  smelt pack model.safetensors                            # writes model.smelt
  smelt pack model.safetensors -o small.smelt --threads 4
  smelt pack Llama-3-8B -o Llama-3-8B-packed              # a folder: every .safetensors in it; the rest is copied

After an interruption the same command goes on from there. In Python: smelt.open, smelt.load_file.""",
    "unpack": """examples:
  smelt unpack model.smelt                                # writes model.safetensors
  smelt unpack Llama-3-8B-packed -o Llama-3-8B""",
}


def options(p: argparse.ArgumentParser, verb: str) -> None:
    before, after = ("FILE.safetensors", "FILE.smelt")[:: 1 if verb == "pack" else -1]
    p.add_argument("source", metavar=before, type=Path, help="the file, or a folder with such files")
    p.add_argument("-o", "--output", type=Path, metavar=after, help="default: beside the source; needed for a folder")
    p.add_argument("--threads", type=positive, default=0, metavar="N", help="default: all cores")
    p.add_argument("--force", action="store_true", help="replace files that exist")


def _run(verb: str, args: argparse.Namespace) -> None:
    args.interrupted = "; the same command goes on from here" if verb == "pack" else "; no half file was left"
    do = pack if verb == "pack" else unpack
    with terminal.TerminalProgress() as progress:
        done = do(args.source, args.output, force=args.force, threads=args.threads, progress=progress)
    if args.json:
        print_json(done.to_plain())
        return
    out = console()
    if done.dtypes:
        out.print(terminal.pack_table(done.to_plain()["dtypes"]))
    out.print(Text(_summary(verb, done)))


def _summary(verb: str, done: Packed) -> str:
    size = done.after if verb == "pack" else done.before
    notes = [f"{done.files} files"] if done.files > 1 else []
    notes += [f"{done.skipped} finished before"] if done.skipped else []
    notes += [f"{done.copied} other files copied"] if done.copied else []
    speed = f"{done.seconds:.1f} s, {done.before / 1e6 / max(done.seconds, 1e-9):,.0f} MB/s"
    what = f"{done.ratio():.3f}x smaller than {done.source}, without loss"
    if done.ratio() < 1:  # a few tensors of a few numbers
        what = f"{done.source} has {done.before:,}"
    if verb == "unpack":
        what = "as it was, byte for byte"
    return f"wrote {done.output}: {size:,} bytes, {what} ({', '.join([*notes, speed])})"


VERBS = {verb: partial(_run, verb) for verb in DOES}
