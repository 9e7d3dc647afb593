"""Storage without data or training: a residual network on scikit-learn's digits, against NNCodec.

    make peers && python benchmarks/storage.py

Half of the images (899) are held out for testing; five seeds.  Both sides code the same trained networks at several
step sizes; what counts is the smallest setting that loses at most 0.2 points of accuracy on the mean over the seeds,
chosen by the same rule for both.  Sizes are those of the written files over the fp32 safetensors checkpoint.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _bench import HERE, Row, arguments, conditions, finish, run_cells
from safetensors.torch import load_file, save_file

import smelt
from smelt.measures.accuracy import evaluate
from smelt.measures.bytes import checkpoint_bytes

PEER = HERE / ".peers" / "nncodec" / "bin" / "python"
MOST_LOST = 0.2
SEEDS = range(5)
BITS = {f"{bits} bits, {scale}": (bits, scale) for scale in ("tensor", "channel") for bits in (5, 4, 3)}
CLUSTERS = {f"{k} clusters": k for k in (16, 12, 8, 6)}
STEPS = (-34, -32, -30, -28, -26, -24, -22, -20)


def recipe(setting: str) -> dict[str, Any]:
    """One shape for all settings: weights on a grid, the rest in 8 bits, everything coded."""
    if setting in CLUSTERS:
        store: dict[str, Any] = {"share.kmeans": {"clusters": CLUSTERS[setting]}}
    else:
        bits, scale = BITS[setting]
        store = {"quantize.affine": {"bits": bits, "per": scale}}
    small = {"quantize.affine": {"bits": 8, "on": ["*.bias", "*bn*.weight", "*.shortcut.1.weight"]}}
    return {"steps": [store, small, {"code.huffman": {}}]}


def seed(number: int, epochs: int, settings: list[str], steps: list[int]) -> dict[str, Any]:
    """Train one network; {side/setting: (bytes, accuracy)} of all settings, and of the network itself."""
    torch.set_num_threads(1)
    data = smelt.open_data("digits", seed=number)
    torch.manual_seed(number)
    model, builder, given = smelt.open_model("resnet_digits")
    train = {"epochs": epochs, "lr": 3e-3, "optimizer": "adamw", "weight_decay": 0.05, "keep": "last", "warmup": 0.1}
    model = smelt.compress(model, {"steps": [{"train": train}]}, smelt.Job(data=data, seed=number, latency=False)).model
    found: dict[str, Any] = {"checkpoint": (checkpoint_bytes(model), evaluate(model, data.test or [], "accuracy"))}
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            path = Path(folder) / "model.smelt"
            job = smelt.Job(data=smelt.Data(test=data.test), latency=False)
            smelt.compress(smelt.Source.of(model, builder, given), recipe(setting), job).save(path, force=True)
            found[f"smelt/{setting}"] = (path.stat().st_size, evaluate(smelt.load(path), data.test or [], "accuracy"))
        if PEER.exists():
            checkpoint = Path(folder) / "model.safetensors"
            state = {k: v.contiguous() for k, v in model.state_dict().items()}
            save_file(state, checkpoint)
            call = [str(PEER), str(HERE / "_nncodec.py"), str(checkpoint), folder, *map(str, steps)]
            subprocess.run(call, check=True, capture_output=True)
            for step in steps:
                model.load_state_dict({**state, **load_file(Path(folder) / f"{step}.safetensors")})
                accuracy = evaluate(model, data.test or [], "accuracy")
                found[f"NNCodec/{step}"] = ((Path(folder) / f"{step}.nnc").stat().st_size, accuracy)
    return found


def main() -> int:
    args = arguments(__doc__ or "")
    print(conditions())
    if not PEER.exists():
        print(f"missing peer: NNCodec, in an environment of its own at {PEER.parent.parent}; `make peers` creates it")
    seeds, epochs, settings, steps = SEEDS, 60, [*BITS, *CLUSTERS], [*STEPS]
    if args.quick:
        seeds, epochs, settings, steps = range(1), 8, settings[:2], steps[:1]
    cells = [{"number": n, "epochs": epochs, "settings": settings, "steps": steps} for n in seeds]
    runs = run_cells("storage", seed, cells, jobs=args.jobs, fresh=args.fresh, seconds=2.5 * epochs + 60)
    base = statistics.mean(run["checkpoint"][1] for run in runs)
    rows, best = [Row("checkpoint, accuracy", round(base, 2), "%")], {}
    for name in runs[0]:
        if name == "checkpoint":
            continue
        ratio = statistics.mean(run["checkpoint"][0] / run[name][0] for run in runs)
        lost = base - statistics.mean(run[name][1] for run in runs)
        side = name.split("/")[0]
        rows.append(Row(f"{name}, ratio", round(ratio, 2), "x"))
        rows.append(Row(f"{name}, points lost", round(lost, 3), "points"))
        if lost <= MOST_LOST and ratio > best.get(side, ("", 0.0))[1]:
            best[side] = (name, ratio)
    ours, peer = best.get("smelt", ("nothing", 0.0)), best.get("NNCodec", ("NNCodec, missing", None))
    target = f">= 8x at <= {MOST_LOST} points lost"
    rows.append(Row(f"best: {ours[0]}, ratio", round(ours[1], 2), "x", peer[0], peer[1] and round(peer[1], 2), target))
    finish(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
