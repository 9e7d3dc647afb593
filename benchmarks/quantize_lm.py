"""Weights of language models in 4, 3, 2 bits and in between, without training: perplexity and bits against peers.

    make peers && SMELT_DATA=... python benchmarks/quantize_lm.py

llama-bytes, a byte-level Llama of 3.5 million weights, and stories260K, a Llama of 0.26 million weights on TinyStories;
all linear layers of the decoder blocks are quantized, with one scale for so many weights in a row.  Perplexity is per
byte on 64 windows of 256 bytes of held-out text, each scored alone, or per token on 128 held-out stories.  Calibration
is 128 windows of other text, the same for all, drawn anew for every repetition.

smelt's are those of the written file, loaded again, and its bits per weight those of these layers in it, coded, with
scales and all.  Peers run in environments of their own; theirs are the bits of their layout, packed without a gap:
codes, 16 bits for a scale, as many bits as a code for a whole zero point, 16 for another (HQQ).  Seconds are of CPU
time: a peer's of quantizing alone, smelt's of the whole recipe with the writing of the file.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import _llama
import _peers_quantize
import torch
from _bench import Row, arguments, conditions, finish, run_cells
from _peers_quantize import MODELS, PEERS, TEXT, folder_of, python_of

import smelt
from smelt.core.store import pack, rest_bytes, store_of
from smelt.core.target import targets

ON = "model.layers.*"
BITS = (4, 3, 2)
OURS = ("affine", "affine mse", "hqq", "gptq", "gptq loss", "awq", "adaround")
# Bits per weight that the rate-distortion quantizer is asked for.
CURVE = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
# What takes minutes, and is run on one draw.
SLOW = ("1000", "awq")
# Most of 4 and 3 bits' bytes that the coded quantizer may take for the same perplexity.
FEWER = {4: 15, 3: 20}


def recipe(method: str, bits: float, group: int) -> dict[str, Any]:
    """All in the dtypes of the peers: scales of 16 bits."""
    key = {"affine mse": "affine", "gptq loss": "gptq", "coded": "entropy"}.get(method, method)
    per: dict[str, Any] = {"per": "group", "group": group} if group else {"per": "channel"}
    settings: dict[str, Any] = {"bits": bits, **per, "scales": "float16"}
    if key == "affine":
        settings |= {"symmetric": False, "zero": "whole", "range": "mse" if method == "affine mse" else "minmax"}
    elif method == "gptq loss":
        settings["error"] = "loss"
    elif method == "awq":
        settings = {"bits": bits, "group": group or 1 << 31}
    elif method == "coded":
        settings = {"bits": bits}
    return {"steps": [{f"quantize.{key}": {**settings, "on": ON}}, {"code.entropy": {"on": ON}}]}


def cell(
    side: str, method: str, model: str, group: int, draw: int, bits: list[float], samples: int, windows: int
) -> dict[str, dict[str, Any]]:
    """str(bits) -> perplexity, bits per weight, seconds, bytes of smelt's file; or why it failed."""
    torch.set_num_threads(1)
    folder = folder_of(model)
    assert folder is not None
    ids = TEXT[model].calibration(folder, samples, draw)
    if side == "dense":
        return {"32": {"perplexity": TEXT[model].perplexity(_llama.read(folder), folder, windows), "bits": 32}}
    found: dict[str, dict[str, Any]] = {}
    for number in bits:
        try:
            found[str(number)] = _own(recipe(method, number, group), model, folder, ids, windows)
        except smelt.SmeltError as error:
            found[str(number)] = {"failed": str(error)}
    return found


def _own(steps: dict[str, Any], name: str, folder: Path, ids: torch.Tensor, windows: int) -> dict[str, Any]:
    data = smelt.Data(train=smelt.Batches(ids, batch_size=max(1, len(ids) // 16)))
    model = _llama.read(folder)
    start = time.process_time()
    result = smelt.compress(model, steps, smelt.Job(data=data, latency=False))
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as place:
        size = result.save(Path(place) / "model.smelt")
        loaded = smelt.load(Path(place) / "model.smelt", into=_llama.read(folder))
    held = store_of(loaded)
    of = [t for t in targets(loaded) if t.name.startswith("model.layers.") and t.is_weight]
    stored = sum(rest_bytes(pack(held.entries[t.name].encoded, held.tails.get(t.name, ()))) for t in of)
    perplexity = TEXT[name].perplexity(loaded, folder, windows)
    each = 8 * stored / sum(t.tensor.numel() for t in of)
    return {"perplexity": perplexity, "bits": each, "seconds": seconds, "bytes": size}


def plan(args: Any, models: list[str], peers: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """The cells; what does not depend on the data runs once."""
    draws, samples = range(5 if args.long else 3), 128
    if args.quick:
        draws, samples = range(1), 16
    cells: list[dict[str, Any]] = []

    def add(model: str, side: str, method: str, group: int, each: range, bits: tuple[float, ...]) -> None:
        windows = 8 if args.quick else 64 if model == "llama-bytes" else 128
        for draw in each:
            where = {"side": side, "method": method, "model": model, "group": group, "draw": draw}
            cells.append({**where, "bits": list(bits), "samples": samples, "windows": windows})

    for model in models:
        add(model, "dense", "", 0, range(1), (32,))
        groups = (64, 128, 0) if model == "llama-bytes" else (32, 0)
        for group in groups[: 1 if args.quick else None]:
            many = draws if group == groups[0] and model == "llama-bytes" else range(1)
            for method in OURS:
                if (method in ("gptq loss", "awq", "adaround") and group != groups[0]) or (
                    args.quick and model == "llama-bytes" and method != "gptq"
                ):
                    continue
                moved = method in ("gptq", "gptq loss", "awq", "adaround")
                add(model, "smelt", method, group, many if moved else range(1), BITS[: 2 if args.quick else None])
            for peer, method, moved in peers if not args.quick else ():
                slow = peer in ("auto-round", "gptqmodel", "llm-compressor") or method == "awq"
                if group == groups[0] or not slow or args.long:
                    add(model, peer, method, group, many if moved and method not in SLOW else range(1), BITS)
        if args.long and peers:
            add(model, "auto-round", "1000", groups[0], range(1), BITS)
        few = (2.0, 3.0) if args.quick else CURVE
        for number in few if not (args.quick and model == "llama-bytes") else ():
            add(model, "smelt", "coded", 0, draws if model == "llama-bytes" else range(1), (number,))
    return cells


def curve_at(points: list[tuple[float, float]], dense: float, wanted: float) -> float | None:
    """Bits at which a curve of (bits, perplexity) has `wanted`; bits are linear in log(perplexity / dense - 1)."""
    good = sorted((b, math.log(p / dense - 1)) for b, p in points if p > dense)
    if wanted <= dense:
        return None
    aim = math.log(wanted / dense - 1)
    for (b0, e0), (b1, e1) in pairwise(good):
        if e1 <= aim <= e0:
            return b1 if e0 == e1 else b0 + (b1 - b0) * (e0 - aim) / (e0 - e1)
    return None


# (model, group, nominal bits, side, method) -> the runs of all draws
Runs = dict[tuple[str, int, str, str, str], list[dict[str, Any]]]


def gathered(cells: list[dict[str, Any]], runs: list[dict[str, dict[str, Any]]]) -> Runs:
    by: Runs = {}
    for where, run in zip(cells, runs, strict=True):
        for number, found in run.items():
            key = (where["model"], where["group"], number, where["side"], where["method"])
            if "failed" in found:
                print(f"failed: {where['model']}, {_label(*key[1:])}: {found['failed']}")
            else:
                by.setdefault(key, []).append(found)
    return by


def _label(group: int, bits: str, side: str, method: str) -> str:
    if method == "coded":
        return f"{bits} bits asked, {method}, {side}"
    name = f"{method} iterations" if method.isdigit() else method
    return f"W{bits} {f'g{group}' if group else 'channel'}, {name}, {side}"


def _mean(runs: list[dict[str, Any]], what: str) -> float:
    return statistics.mean(run[what] for run in runs)


def table(model: str, by: Runs) -> tuple[list[Row], list[Row]]:
    """(rows to print, rows that are only written)"""
    own = {key: runs for key, runs in by.items() if key[0] == model}
    dense = next(_mean(runs, "perplexity") for key, runs in own.items() if key[3] == "dense")
    rows, more = [Row(f"{model}, dense, perplexity", round(dense, 4))], []
    quantized = {key: runs for key, runs in own.items() if key[3] != "dense"}
    for key, runs in sorted(
        quantized.items(), key=lambda item: (-float(item[0][2]), -item[0][1], item[0][3] == "smelt")
    ):
        name, values = f"{model}, {_label(*key[1:])}", [run["perplexity"] for run in runs]
        spread = f"+- {statistics.stdev(values):.4f}; " if len(values) > 1 else ""
        bits, seconds = _mean(runs, "bits"), _mean(runs, "seconds")
        rows.append(Row(name, round(statistics.mean(values), 4), f"{spread}{bits:.3f} bits; {seconds:.1f} s"))
        more += [Row(f"{name}, bits per weight", round(bits, 4)), Row(f"{name}, time", round(seconds, 1), "s")]
        if key[3] == "smelt":
            more.append(Row(f"{name}, file", round(_mean(runs, "bytes")), "bytes"))
    points = [(_mean(r, "bits"), _mean(r, "perplexity")) for k, r in quantized.items() if k[4] == "coded"]
    for bits in BITS:
        same = {k: r for k, r in quantized.items() if k[2] == str(bits) and k[4] != "coded"}
        sides = [{k: r for k, r in same.items() if (k[3] == "smelt") == ours} for ours in (True, False)]
        if not all(sides):
            continue
        best = [min(side, key=lambda k, side=side: _mean(side[k], "perplexity")) for side in sides]  # type: ignore[misc]
        mine, theirs = (round(_mean(same[k], "perplexity"), 4) for k in best)
        name = f"{model}, best of {bits} bits: {_label(*best[0][1:])}"
        rows.append(Row(name, mine, "", _label(*best[1][1:]), theirs, "no more than the best peer"))
        found = curve_at(points, dense, _mean(same[best[1]], "perplexity"))
        packed = _mean(same[best[1]], "bits")
        less = "outside of the curve" if found is None else f"bits, {100 * (1 - found / packed):.1f} % fewer"
        goal = f">= {FEWER[bits]} % fewer" if bits in FEWER else None
        name = f"{model}, coded, at the perplexity of the best {bits}-bit peer"
        rows.append(Row(name, found and round(found, 4), less, _label(*best[1][1:]), round(packed, 4), goal))
    return rows, more


def main() -> int:
    args = arguments(__doc__ or "")
    print(conditions())
    models = [model for model in MODELS if folder_of(model) is not None]
    for model in MODELS:
        if model not in models:
            print(f"missing data: SMELT_DATA must name a folder that holds {MODELS[model]}")
    if not models:
        return 1
    for name in dict.fromkeys(peer for peer, _, _ in PEERS):
        if not python_of(name).exists():
            where = python_of(name).parent.parent
            print(f"missing peer: {name}, in an environment of its own at {where}; see `make peers`")
    cells = plan(args, models, [peer for peer in PEERS if python_of(peer[0]).exists()])
    own = [where for where in cells if where["side"] in ("dense", "smelt")]
    theirs = [where for where in cells if where not in own]
    how = {"jobs": args.jobs, "fresh": args.fresh}
    runs = run_cells("quantize_lm", cell, own, **how, seconds=5 if args.quick else 60)
    runs += run_cells("quantize_lm, peers", _peers_quantize.cell, theirs, **how, seconds=90) if theirs else []
    by = gathered([*own, *theirs], runs)
    rows: list[Row] = []
    more: list[Row] = []
    for model in models:
        shown, written = table(model, by)
        rows, more = rows + shown, more + written
    finish(rows, args.json, more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
