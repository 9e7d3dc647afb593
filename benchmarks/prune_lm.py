"""Half of a language model's weights, or 2 of every 4, without training: perplexity against published methods.

    make peers && SMELT_DATA=... python benchmarks/prune_lm.py

A byte-level Llama of 3.5 million weights; all linear layers of its decoder blocks are pruned.  Perplexity is per byte
on 64 windows of 256 bytes of held-out text, each scored alone; calibration is 128 windows of the training text, drawn
anew for every repetition.  smelt's are those of the written file, loaded again; peers are the papers' algorithms as
short references (`_peers_prune.py`) and llm-compressor in an environment of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import HERE, Row, arguments, conditions, finish, run_cells
from _llama import Llama, calibration, perplexity, read
from _peers_prune import prune
from _weights import llama
from safetensors.torch import load_file

import smelt
from smelt.measures.bytes import checkpoint_bytes

PEER = HERE / ".peers" / "llmcompressor" / "bin" / "python"
PATTERNS = ("50 %", "2:4")
OURS: dict[str, dict[str, Any]] = {
    "magnitude": {"prune.weights": {}},
    "wanda": {"prune.weights": {"score": "activation"}},
    "sparsegpt": {"prune.sparsegpt": {}},
    "admm": {"prune.sparsegpt": {"solver": "admm", "gather": "layer"}},
}
ON = "model.layers.*"


def recipe(method: str, pattern: str) -> dict[str, Any]:
    key, settings = next(iter(OURS[method].items()))
    extra: dict[str, Any] = {"pattern": pattern} if pattern == "2:4" else {"ratio": 0.5}
    if method == "wanda" and pattern != "2:4":
        extra["scope"] = "row"
    return {"steps": [{key: {**settings, **extra, "on": ON}}, {"code.entropy": {}}]}


def cell(side: str, method: str, pattern: str, draw: int, samples: int, windows: int) -> dict[str, Any]:
    """Prune once; perplexity, seconds, zeros, and the bytes of smelt's file."""
    torch.set_num_threads(1)
    found = llama()
    assert found is not None
    folder = found.parent
    model, ids = read(folder), calibration(folder, samples, draw)
    size = None
    start = time.perf_counter()
    if side == "dense":
        size = checkpoint_bytes(model)
    elif side == "smelt":
        data = smelt.Data(train=smelt.Batches(ids, batch_size=max(1, samples // 16)))
        result = smelt.compress(model, recipe(method, pattern), smelt.Job(data=data, latency=False))
        with tempfile.TemporaryDirectory() as place:
            size = result.save(Path(place) / "model.smelt")
            loaded = smelt.load(Path(place) / "model.smelt", into=read(folder))
            assert isinstance(loaded, Llama)
            model = loaded
    elif side == "paper":
        prune(model, method, None if pattern == "50 %" else pattern, ids)
    seconds = time.perf_counter() - start
    if side == "llm-compressor":
        with tempfile.TemporaryDirectory() as place:
            np.save(Path(place) / "ids.npy", ids.numpy())
            out = Path(place) / "model.safetensors"
            call = [str(PEER), str(HERE / "_llmcompressor.py"), str(folder), method]
            call += ["none" if pattern == "50 %" else pattern, str(Path(place) / "ids.npy"), str(out)]
            text = subprocess.run(call, check=True, capture_output=True, text=True, cwd=place).stdout
            seconds = float(next(line for line in text.splitlines() if line.startswith("SECONDS")).split()[1])
            model.load_state_dict(load_file(out))
    pruned = [p for name, p in model.named_parameters() if name.startswith("model.layers.") and p.dim() > 1]
    zeros = sum(int((p == 0).sum()) for p in pruned) / sum(p.numel() for p in pruned)
    return {"perplexity": perplexity(model, folder, windows), "seconds": seconds, "zeros": zeros, "bytes": size}


def main() -> int:
    args = arguments(__doc__ or "")
    print(conditions())
    if llama() is None:
        print("missing data: SMELT_DATA must name a folder that holds llama-bytes")
        return 1
    draws, samples, windows = range(5 if args.long else 3), 128, 64
    if args.quick:
        draws, samples, windows = range(1), 16, 8
    methods = ["wanda", "admm"] if args.quick else list(OURS)
    kinds = [("smelt", method) for method in methods] + [("paper", m) for m in methods if m != "admm"]
    if PEER.exists() and not args.quick:
        kinds += [("llm-compressor", "wanda"), ("llm-compressor", "sparsegpt")]
    elif not PEER.exists():
        print(f"missing peer: llm-compressor, in an environment of its own at {PEER.parent.parent}; see `make peers`")
    keys = [("dense", "", "", 0)]
    patterns = PATTERNS[1:] if args.quick else PATTERNS
    for draw in draws:
        for pattern in patterns:
            keys += [(*kind, pattern, draw) for kind in kinds if draw == 0 or kind[1] != "magnitude"]
    cells = [dict(zip(("side", "method", "pattern", "draw"), key, strict=True)) for key in keys]
    cells = [{**c, "samples": samples, "windows": windows} for c in cells]
    runs = run_cells("prune_lm", cell, cells, jobs=args.jobs, fresh=args.fresh, seconds=30 if not args.quick else 3)
    by: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for (side, method, pattern, _), run in zip(keys, runs, strict=True):
        by.setdefault((pattern, side, method), []).append(run)
    dense = runs[0]
    rows = [
        Row("dense, perplexity", round(dense["perplexity"], 4), "", "llama-bytes, published", 3.0111, "the same"),
        Row("dense, checkpoint", dense["bytes"], "bytes"),
    ]
    for pattern in patterns:
        means = {k[1:]: statistics.mean(r["perplexity"] for r in v) for k, v in by.items() if k[0] == pattern}
        peer = min((k for k in means if k[0] != "smelt"), key=lambda k: means[k])
        for side, method in kinds:
            mine = by[pattern, side, method]
            values = [run["perplexity"] for run in mine]
            spread = f"+- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            name = f"{pattern}, {method}, {side}"
            last = side == "smelt" and method == "admm"
            against = (" ".join(reversed(peer)), round(means[peer], 4), "no more than the best peer") if last else ()
            rows.append(Row(f"{name}, perplexity", round(means[side, method], 4), spread, *against))
            rows.append(Row(f"{name}, zeros", round(100 * statistics.mean(run["zeros"] for run in mine), 2), "%"))
            if side == "smelt":
                rows.append(Row(f"{name}, file", round(statistics.mean(run["bytes"] for run in mine)), "bytes"))
            rows.append(Row(f"{name}, time", round(statistics.mean(run["seconds"] for run in mine), 1), "s"))
    finish(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
