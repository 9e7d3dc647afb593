"""10, 20 and 30 % fewer parameters in a language model by low rank, without training: perplexity against peers.

    SMELT_DATA=... python benchmarks/lowrank_lm.py

A byte-level Llama of 3.5 million weights; all linear layers of its decoder blocks are split, and the share is of their
parameters.  Perplexity is per byte on 64 windows of 256 bytes of held-out text, each scored alone; calibration is 128
windows of the training text, drawn anew for every repetition.  smelt's are those of the written file, loaded again;
peers are the papers' algorithms as short references (`_peers_lowrank.py`), every layer of the same share.

    plain, fisher, inputs    lowrank.svd with the same share of every layer, by what errors of the weight count by
    ours                     weight: loss, ranks by one budget for all layers, fitted in order
    ours, pivoted            the same with layers that combine outputs from others

The last rows put 4 bits on top of it (quantize.gptq), and compare with 4 bits alone in as many bytes: fewer bits for
the dense layers, found by quantize.entropy.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _bench import Row, arguments, conditions, finish, run_cells
from _llama import Llama, calibration, perplexity, read
from _peers_lowrank import factor
from _weights import llama

import smelt
from smelt.measures.bytes import checkpoint_bytes

FEWER = (10, 20, 30)
PEERS = ("SVD", "FWSVD", "ASVD", "SVD-LLM")
OURS = ("plain", "fisher", "inputs", "ours", "ours, pivoted")
ON = "model.layers.*"
# Bits of the values under the factors, and how many parameters these leave out.
BITS, WITH = 4, (10, 20)


def steps(method: str, fewer: int) -> list[Any]:
    share = (100 - fewer) / 100
    settings: dict[str, Any] = {"weight": method, "ratio": share}
    if method.startswith("ours"):
        settings = {"weight": "loss", "budget": f"{share}x", "refit": True}
    if method == "ours, pivoted":
        settings["form"] = "pivoted"
    return [{"lowrank.svd": {**settings, "on": ON}}]


def cell(side: str, method: str, fewer: float, draw: int, samples: int, windows: int) -> dict[str, Any]:
    """Perplexity, seconds, share of the parameters left, bytes of smelt's file.

    side: 'dense', 'paper', 'smelt'; 'bits' of smelt with quantized factors; 'alone' of quantized dense layers, where
        `fewer` is the bits per weight.
    """
    torch.set_num_threads(1)
    found = llama()
    assert found is not None
    folder = found.parent
    model, ids = read(folder), calibration(folder, samples, draw)
    before = _count(model)
    size = None
    start = time.perf_counter()
    if side == "dense":
        size = checkpoint_bytes(model)
    elif side == "paper":
        factor(model, method, 1 - fewer / 100, ids)
    else:
        recipe: list[Any] = steps(method, int(fewer)) if side in ("smelt", "bits") else []
        if side == "bits":
            recipe.append({"quantize.gptq": {"bits": BITS, "group": 64, "on": ON}})
        if side == "alone":
            recipe.append({"quantize.entropy": {"bits": fewer, "on": ON}})
        if side != "smelt":
            recipe.append({"code.entropy": {"on": ON}})
        data = smelt.Data(train=smelt.Batches(ids, batch_size=max(1, samples // 16)))
        result = smelt.compress(model, {"steps": recipe}, smelt.Job(data=data, latency=False))
        with tempfile.TemporaryDirectory() as place:
            size = result.save(Path(place) / "model.smelt")
            loaded = smelt.load(Path(place) / "model.smelt", into=read(folder))
            assert isinstance(loaded, Llama)
            model = loaded
    seconds = time.perf_counter() - start
    left = 1 - fewer / 100 if side == "paper" else _count(model) / before
    return {"perplexity": perplexity(model, folder, windows), "seconds": seconds, "left": left, "bytes": size}


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith("model.layers.") and p.dim() > 1)


def perplexity_at(points: list[tuple[float, float]], size: float) -> float | None:
    """Perplexity of a curve of (bytes, perplexity) at a size, linear in between."""
    for (b0, p0), (b1, p1) in zip(sorted(points), sorted(points)[1:], strict=False):
        if b0 <= size <= b1:
            return p0 + (p1 - p0) * (size - b0) / (b1 - b0)
    return None


def main() -> int:
    args = arguments(__doc__ or "")
    print(conditions())
    if llama() is None:
        print("missing data: SMELT_DATA must name a folder that holds llama-bytes")
        return 1
    draws, samples, windows = range(5 if args.long else 3), 128, 64
    fewer: tuple[int, ...] = (*FEWER, 40, 50) if args.long else FEWER
    peers, ours, curve = PEERS, OURS, (2.5, 3.0, 3.5, 4.0)
    if args.quick:
        draws, samples, windows, fewer = range(1), 16, 8, (20,)
        peers, ours, curve = ("SVD", "SVD-LLM"), ("plain", "inputs", "ours"), ()
    keys: list[tuple[str, str, float, int]] = [("dense", "", 0, 0)]
    for share in fewer:
        keys += [("paper", m, share, d) for m in peers for d in (draws if m != "SVD" else range(1))]
        keys += [("smelt", m, share, d) for m in ours for d in (draws if m != "plain" else range(1))]
    keys += [("alone", "", bits, 0) for bits in curve]
    keys += [("bits", m, share, 0) for m in ours[-2:] for share in WITH if curve]
    cells = [dict(zip(("side", "method", "fewer", "draw"), key, strict=True)) for key in keys]
    cells = [{**c, "samples": samples, "windows": windows} for c in cells]
    runs = run_cells("lowrank_lm", cell, cells, jobs=args.jobs, fresh=args.fresh, seconds=4 if args.quick else 15)
    by: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for key, run in zip(keys, runs, strict=True):
        by.setdefault(key[:3], []).append(run)
    published = () if args.quick else ("llama-bytes, published", 3.0111, "the same")
    rows = [
        Row("dense, perplexity", round(runs[0]["perplexity"], 4), "", *published),
        Row("dense, checkpoint", runs[0]["bytes"], "bytes"),
    ]

    def mean(key: tuple[str, str, float], what: str = "perplexity") -> float:
        return statistics.mean(run[what] for run in by[key])

    more: list[Row] = []
    for share in fewer:
        best = min((("paper", m, share) for m in peers), key=mean)
        for key in [k for k in by if k[2] == share and k[0] in ("paper", "smelt")]:
            values = [run["perplexity"] for run in by[key]]
            spread = f"+- {statistics.stdev(values):.4f}; " if len(values) > 1 else ""
            name = f"{share} % fewer, {key[1]}, {key[0]}"
            against = (best[1], round(mean(best), 4), "less than the best peer") if key[1].startswith("ours") else ()
            about = f"{spread}{100 * mean(key, 'left'):.1f} % left; {mean(key, 'seconds'):.1f} s"
            rows.append(Row(name, round(mean(key), 4), about, *against))
            if key[0] == "smelt":
                more.append(Row(f"{name}, file", round(mean(key, "bytes")), "bytes"))
    points = [(mean(key, "bytes"), mean(key)) for key in by if key[0] == "alone"]
    for key in [k for k in by if k[0] in ("alone", "bits")]:
        size, name = mean(key, "bytes"), f"{BITS} bits of {100 - key[2]:.0f} %, {key[1]}"
        if key[0] == "alone":
            rows.append(Row(f"{key[2]} bits alone", round(mean(key), 4), f"{size:,.0f} bytes"))
            continue
        alone = perplexity_at(points, size)
        goal = "less than as many bytes of bits alone"
        peer = ("quantize.entropy", None if alone is None else round(alone, 4), goal)
        rows.append(Row(name, round(mean(key), 4), f"{size:,.0f} bytes", *peer))
    finish(rows, args.json, more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
