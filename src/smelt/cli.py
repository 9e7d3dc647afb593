"""The command line: one verb per command, errors in one line, results on stdout and all else on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from smelt import _cli_deploy, _cli_measure, _cli_pack, demo
from smelt._cli_options import (
    Parser,
    console,
    data_of,
    is_file,
    metric_of,
    model_options,
    print_json,
    say,
    source_of,
)
from smelt.compress import compress
from smelt.core import shelf
from smelt.core.errors import OutputError, SmeltError
from smelt.core.job import Job
from smelt.core.method import Method
from smelt.core.output import check_output
from smelt.core.recipe import LOOPS, Recipe
from smelt.core.yaml_text import to_yaml
from smelt.formats import smelt as smelt_file
from smelt.measure import conditions, measure
from smelt.measures.bytes import checkpoint_bytes
from smelt.reports import html, terminal
from smelt.reports._methods import described
from smelt.reports._stages import times
from smelt.version import __version__

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see core/errors.py)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    args = argparse.Namespace(debug=False)
    try:
        args = _parser().parse_args(argv)
        args.run(args)
        return 0
    except SmeltError as error:
        if args.debug:
            raise
        say(" ".join(str(error).split()))
        return error.exit_code
    except KeyboardInterrupt:
        say(f"interrupted{getattr(args, 'interrupted', '')}")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _compress(args: argparse.Namespace) -> None:
    outputs = [args.output, *([args.report] if args.report else [])]
    for path in outputs:
        _check_output(path, args.force)
    if args.output == args.report:
        raise OutputError(f"{str(args.output)!r} cannot be both the model and the report")
    recipe = _recipe(args.recipe)
    cache = None if args.no_cache else _cache(args.cache)
    data, metric = data_of(args), metric_of(args.metric)
    source = source_of(args.model, args.weights, args)
    teacher = source_of(args.teacher, args.teacher_weights, args, "teacher").module if args.teacher else None
    kept = cache is not None and (data is None or data.fingerprint is not None)
    why = "--no-cache" if cache is None else "this data has no fingerprint"
    args.interrupted = (
        f"; the same command goes on from here (kept in {cache})" if kept else f"; nothing was kept: {why}"
    )
    job = Job(
        data,
        metric,
        teacher=teacher.eval().to(args.device) if teacher is not None else None,
        device=args.device,
        seed=args.seed,
        cache=cache,
        checkpoint=args.checkpoint,
        log=args.log,
        latency=not args.no_latency,
        threads=args.threads,
    )
    first = os.environ.get("RANK", "0") == "0"  # of those that a launcher started
    with terminal.TerminalProgress() as progress:
        result = compress(source, recipe, job, progress=progress if first else None)
    if not first:
        return
    size = result.save(args.output, force=args.force)
    if args.report:
        html.write(result.report, args.report, title=f"{Path(args.model).name}, {recipe.name}", force=args.force)
    if args.json:
        plain = {"file": str(args.output), "bytes": size, "ratio": result.report.ratio(), **result.report.to_plain()}
        print_json(plain)
        return
    out = console()
    out.print(terminal.stage_table(result.report, out.width))
    out.print(
        Text(f"\nwrote {' and '.join(map(str, outputs))}: {times(result.report.ratio())} smaller than the checkpoint")
    )


def _measure(args: argparse.Namespace) -> None:
    _cli_measure.check(args)
    source = source_of(args.model, args.weights, args)
    assert source.module is not None
    size = Path(args.model).stat().st_size if is_file(args.model) else None
    data = data_of(args)
    if args.sensitivity:
        cache = None if args.no_cache else _cache(args.cache)
        args.interrupted = "; nothing was kept" if cache is None else f"; the same command goes on from here ({cache})"
        job = Job(data, metric_of(args.metric), device=args.device, seed=args.seed, cache=cache)
        return _cli_measure.run(args, source, job)
    rows = measure(
        source.module,
        data,
        metric_of(args.metric),
        device=args.device,
        latency=not args.no_latency,
        threads=args.threads,
        size=size,
        after=Path(args.model).name,
    )
    checkpoint, under = checkpoint_bytes(source.module), conditions(rows, data, args.device)
    if args.json:
        found = {"model": args.model, "checkpoint": checkpoint, "ratio": checkpoint / rows[0].value}
        print_json({**found, "conditions": under, "rows": [asdict(row) for row in rows]})
        return
    out = console()
    out.print(terminal.measure_table(rows, args.model))
    out.print(terminal.conditions_line(under))
    if size is not None:
        out.print(
            Text(f"{times(checkpoint / size)} smaller than the same model as a checkpoint of {checkpoint:,} bytes")
        )
    if not args.data:
        out.print(Text("MACs, memory, latency and accuracy need data: --data digits", "dim"))


def _show(args: argparse.Namespace) -> None:
    found = smelt_file.show(args.file)
    if args.json:
        print_json(found)
        return
    out = console()
    call = ", ".join(f"{k}={v!r}" for k, v in found["arguments"].items())
    built = f"{found['builder']}({call})" if found["builder"] else "nothing named; load it into a module"
    if found["origin"]:
        built = "no model: a packed checkpoint; see smelt unpack --help"
    lines = {
        "file": f"{found['file']}, format version {found['version']}",
        "bytes": f"{found['bytes']:,}: {found['leaf bytes']:,} of tensors, {found['meta bytes']:,} of everything else",
        "built by": built,
        "activations": "; ".join(f"{codec} at the {at} of {path}" for path, at, codec in found["activations"]),
    }
    out.print(terminal.facts({k: v for k, v in lines.items() if v}))
    out.print(terminal.layer_table([{**t, "stored": t["rest"]} for t in found["tensors"]]))
    if found["edits"]:
        out.print(Text("edits", "bold"))
        for edit in found["edits"]:
            out.print(Text("  " + " ".join(map(str, edit))), no_wrap=True, overflow="ellipsis")
    if found["recipe"]:
        out.print(Text("recipe", "bold"))
        out.print(Text(to_yaml(found["recipe"])))
    if found["report"]:
        out.print(Text("measured, by step", "bold"))
        for step, name, value in found["report"]:
            out.print(Text(f"  {step}  {name}: {value:,}"))


def _methods(args: argparse.Namespace) -> None:
    names = [n for n in shelf.names("methods") if args.name in (None, n) or n.startswith(f"{args.name}.")]
    if args.name in LOOPS:
        found = {args.name: described(args.name, LOOPS[args.name])}
    elif args.name and not names:
        shelf.module("methods", args.name)  # raises, and says what is near
    else:
        found = {name: described(name, shelf.load("methods", name, Method)) for name in names}
    if args.json:
        print_json(found)
        return
    out = console()
    cards = {name: method["card"] for name, method in found.items()}
    if args.name not in found:
        out.print(terminal.methods_table(cards, out.width))
        out.print(Text("smelt methods NAME shows the settings of one", "dim"))
        return
    method = found[args.name]
    out.print(terminal.method_card(args.name, method["card"]))
    if method["settings"]:
        out.print(terminal.settings_table(method["settings"]))
    if method["words"]:
        out.print(
            Text("words of the step, where a setting is chosen for each tensor: bits: {allocate: [2, 4, 8]}", "bold")
        )
        out.print(terminal.settings_table(method["words"]))
    out.print(Text("in a recipe", "bold"))
    out.print(Text("\n".join(f"  {line}" for line in method["example"].splitlines())))


def _demo(args: argparse.Namespace) -> None:
    where = console(sys.stderr if args.json else sys.stdout)
    report = demo.run(Path(args.out), seed=args.seed, force=args.force, console=where)
    if args.json:
        print_json({"ratio": report.ratio(), **report.to_plain()})


def _recipe(text: str) -> Recipe:
    own = demo.RECIPES / f"{text}.yaml"
    return Recipe.of(own if "/" not in text and not Path(text).exists() and own.is_file() else Path(text))


def _cache(folder: Path | None) -> Path:
    folder = folder or Path(os.environ.get("SMELT_CACHE") or "~/.cache/smelt").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the cache {str(folder)!r} cannot be made ({error.strerror}); see --no-cache") from None
    _check_output(folder / "step", force=True)
    return folder


def _check_output(path: Path, force: bool) -> None:
    check_output(path, force)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{str(path)!r}: the folder {str(path.parent)!r} is not writable")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="smelt", description="Compress trained neural networks.", epilog=EXAMPLES["smelt"])
    parser.add_argument("--version", action="version", version=f"smelt {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text + ".", epilog=EXAMPLES[name])
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="machine-readable, to stdout")
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    c = verb("compress", _compress, "run a recipe on a trained model and write a .smelt file")
    model_options(c)
    c.add_argument(
        "--recipe", required=True, metavar="FILE", help=f"a .yaml file, or one of ours: {', '.join(_recipes())}"
    )
    c.add_argument("-o", "--output", required=True, type=Path, metavar="OUT.smelt", help="the file to write")
    c.add_argument("--report", type=Path, metavar="PAGE.html", help="also write a page with everything measured")
    c.add_argument("--force", action="store_true", help="replace files that exist")
    c.add_argument("--teacher", metavar="MODEL", help="whom distill.* follows; default: the model as it came")
    c.add_argument("--teacher-weights", metavar="FILE", help="the teacher's weights")
    c.add_argument("--cache", type=Path, metavar="DIR", help="where steps are kept ($SMELT_CACHE, else ~/.cache/smelt)")
    c.add_argument("--no-cache", action="store_true", help="keep nothing; an interrupted run starts anew")
    c.add_argument(
        "--checkpoint", type=float, default=Job.checkpoint, metavar="MINUTES", help="between two states of a train step"
    )
    c.add_argument("--log", type=Path, metavar="PATH", help="of training: a .csv file, or a folder for TensorBoard")

    m = verb("measure", _measure, "measure a model or a .smelt file")
    model_options(m)
    _cli_measure.options(m)

    s = verb("show", _show, "show what is in a .smelt file")
    s.add_argument("file", metavar="FILE.smelt")

    t = verb("methods", _methods, "compare the methods, or show one with its settings")
    t.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a method such as share.kmeans, a group such as prune, train, or recover",
    )

    d = verb(
        "demo", _demo, "train a small network on scikit-learn's digits, compress it, write demo.smelt and report.html"
    )
    d.add_argument("--out", default=".", metavar="DIR", help="folder for the two files (default: here)")
    d.add_argument("--seed", type=int, default=0, help="of the split, the training and the recipe (default: 0)")
    d.add_argument("--force", action="store_true", help="replace files that exist")
    for name, run in _cli_pack.VERBS.items():
        _cli_pack.options(verb(name, run, _cli_pack.DOES[name]), name)
    for name, deploy in _cli_deploy.VERBS.items():
        _cli_deploy.OPTIONS[name](verb(name, deploy, _cli_deploy.DOES[name]))
    return parser


def _recipes() -> list[str]:
    return sorted(path.stem for path in demo.RECIPES.glob("*.yaml"))


EXAMPLES = {
    "smelt": """examples:
  smelt demo                                              # a minute; writes demo.smelt and report.html
  smelt methods                                           # what there is, side by side
  smelt compress lenet --weights lenet.pt --data mnist.npz --recipe recipe.yaml -o lenet.smelt
  smelt measure lenet.smelt --data mnist.npz
  smelt export lenet.smelt --to onnx --data mnist.npz     # for a runtime; smelt bench compares them
  smelt pack model.safetensors                            # smaller without loss; smelt unpack restores it

exit codes: 0 done, 2 usage or recipe, 3 model, 4 data, 5 file, 6 output, 130 interrupted""",
    "compress": """examples:
  smelt compress lenet --weights lenet.pt --data mnist.npz --recipe recipe.yaml -o lenet.smelt --report report.html
  smelt compress 'lenet(size=8, kernel=3, padding=1)' --weights digits.pt --data digits --recipe demo -o digits.smelt
  smelt compress my_models:net --weights net.safetensors --data my_data:load --metric my_data:score \\
        --recipe recipe.yaml -o net.smelt
  smelt compress net.smelt --recipe more.yaml -o smaller.smelt      # compress further

Steps are kept in the cache: the same command goes on after an interruption, an edited recipe from the edit.""",
    "measure": """examples:
  smelt measure lenet --weights lenet.pt --data mnist.npz
  smelt measure lenet.smelt --data mnist.npz --json
  smelt measure net.smelt --trust --data my_data:load --metric loss"""
    + _cli_measure.EXAMPLES,
    "show": """examples:
  smelt show lenet.smelt
  smelt show lenet.smelt --json | jq '.tensors[] | {name, bytes, bits}'""",
    "methods": """examples:
  smelt methods
  smelt methods prune
  smelt methods share.kmeans
  smelt methods train""",
    "demo": """examples:
  smelt demo
  smelt demo --out /tmp/demo --seed 3 --force""",
    **_cli_pack.EXAMPLES,
    **_cli_deploy.EXAMPLES,
}


if __name__ == "__main__":
    sys.exit(main())
