"""Channel pruning over a zoo of architectures, against Torch-Pruning.

    pip install --requirement benchmarks/requirements.txt && python benchmarks/prune_zoo.py

Half of the channels of every group, those of the smallest weights, are taken out of every model in `_zoo.py` (random
weights) by either side; the result must run, be saved, be loaded and give the same outputs.  smelt loads its file into
a freshly built model, Torch-Pruning's way is to pickle the whole model.  A model counts as shrunk when at least a fifth
of its parameters is gone.  Each model and side has a process of its own, with limits on memory and time, so that a
failure is a row.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import _prune_one
from _bench import Row, arguments, conditions, finish, run_cells
from _zoo import QUICK, models

SIDES = ("smelt", "torch-pruning")
SHRUNK = 0.2  # share of the parameters that must be gone


def prune(library: str, model: str, pixels: int, side: str) -> dict[str, Any]:
    return _prune_one.run(library, model, pixels, side)


def removed(found: dict[str, Any]) -> float:
    """Share of the parameters that is gone; 0 for what did not work."""
    before, after = found.get("parameters", (1, 1))
    return 1 - float(after) / float(before)


def verdict(found: dict[str, Any]) -> str:
    for kind in ("error", "refused"):
        if kind in found:
            return f"{'fails' if kind == 'error' else 'refuses'}: {found[kind]}"
    return "shrinks" if removed(found) >= SHRUNK else "runs, hardly smaller"


def main() -> int:
    args = arguments(__doc__ or "")
    print(conditions())
    zoo = [m for m in models(more=args.long) if m.name in QUICK or not args.quick]
    cells = [{"library": m.library, "model": m.name, "pixels": m.pixels, "side": side} for m in zoo for side in SIDES]
    results = run_cells("prune_zoo", prune, cells, jobs=args.jobs, fresh=args.fresh, seconds=15)
    rows, more = [], []
    for index, m in enumerate(zoo):
        own, peer = results[2 * index : 2 * index + 2]
        name = f"{m.library} {m.family}: {m.name}"
        shares = [round(100 * removed(found), 1) for found in (own, peer)]
        rows.append(Row(f"{name}, {verdict(own)}", shares[0], "% gone", f"Torch-Pruning, {verdict(peer)}", shares[1]))
        more += details(name, own, peer)
    rows += totals(zoo, results[::2], results[1::2])
    finish(rows, args.json, more)
    return 0


def details(name: str, own: dict[str, Any], peer: dict[str, Any]) -> list[Row]:
    """What else was found about one model."""
    rows = []
    for key, unit in (("parameters", ""), ("macs", "MACs")):
        for when, index in (("before", 0), ("after", 1)):
            values = [found.get(key, (None, None))[index] for found in (own, peer)]
            rows.append(Row(f"{name}, {key} {when}", values[0], unit, "Torch-Pruning", values[1]))
    for key, unit in (("bytes", "bytes"), ("seconds", "s"), ("megabytes", "MB")):
        rows.append(Row(f"{name}, {key}", own.get(key), unit, "Torch-Pruning", peer.get(key)))
    rows += [Row(f"{name}: {note}", None) for note in own.get("notes", ())]
    return rows


def totals(zoo: list[Any], own: list[dict[str, Any]], peer: list[dict[str, Any]]) -> list[Row]:
    def share(found: list[dict[str, Any]], holds: Any) -> float:
        return round(100 * sum(map(holds, found)) / len(found), 1)

    def answers(found: dict[str, Any]) -> bool:
        return "error" not in found

    def shrinks(found: dict[str, Any]) -> bool:
        return verdict(found) == "shrinks"

    families = sorted({(m.library, m.family) for m in zoo})
    behind = []
    for family in families:
        here = [i for i, m in enumerate(zoo) if (m.library, m.family) == family]
        if sum(shrinks(own[i]) for i in here) < sum(shrinks(peer[i]) for i in here):
            behind.append(" ".join(family))
    gone = [[100 * removed(f) for f in found if shrinks(f)] for found in (own, peer)]
    median = [round(statistics.median(shares), 1) if shares else None for shares in gone]
    tp = "Torch-Pruning"
    return [
        Row("families", len(families), target=">= 60"),
        Row("models", len(zoo)),
        Row("succeed or refuse with a named reason", share(own, answers), "%", tp, share(peer, answers), "100 %"),
        Row("really shrink", share(own, shrinks), "%", tp, share(peer, shrinks), ">= 95 %"),
        Row("parameters gone where it shrinks, median", median[0], "%", tp, median[1]),
        Row(
            f"families where fewer shrink than with {tp}: {', '.join(behind) or 'none'}", len(behind), "", "", None, "0"
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
