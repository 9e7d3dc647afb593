"""Other libraries that quantize the weights of a language model, run in environments of their own: `_peer_*.py`."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import _llama
import _stories
import numpy as np
import torch
from _bench import HERE

MODELS = {"llama-bytes": "llama-bytes", "stories260K": "stories260K/hf"}
TEXT = {"llama-bytes": _llama, "stories260K": _stories}
# Library, what is run of it, and whether it depends on the calibration data; AutoRound's is the number of iterations.
PEERS = (
    ("neural-compressor", "rtn", False),
    ("neural-compressor", "gptq", True),
    ("neural-compressor", "awq", True),
    ("llm-compressor", "gptq", True),
    ("hqq", "hqq", False),
    ("auto-round", "200", True),
    ("gptqmodel", "gptq", True),
)
LIMIT = 3600  # seconds for a call


def python_of(peer: str) -> Path:
    return HERE / ".peers" / peer.replace("-", "") / "bin" / "python"


def folder_of(model: str) -> Path | None:
    path = Path(os.environ.get("SMELT_DATA", "")) / MODELS[model]
    return path if "SMELT_DATA" in os.environ and (path / "config.json").is_file() else None


def cell(
    side: str, method: str, model: str, group: int, draw: int, bits: list[int], samples: int, windows: int
) -> dict[str, dict[str, Any]]:
    """str(bits) -> perplexity, bits per weight and seconds; or why it failed."""
    torch.set_num_threads(1)
    folder = folder_of(model)
    assert folder is not None
    ids = TEXT[model].calibration(folder, samples, draw)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "ids.npy", ids.numpy())
        script = HERE / f"_peer_{side.replace('-', '')}.py"
        call = [str(python_of(side)), str(script), str(folder), method, ",".join(map(str, bits)), str(group)]
        done = subprocess.run(
            [*call, str(Path(place) / "ids.npy"), place],
            capture_output=True,
            text=True,
            cwd=place,
            timeout=LIMIT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
        said = {line[1]: line for line in lines if line[0] in ("DONE", "FAILED") and len(line) == 3}
        for number in map(str, bits):
            if number not in said or said[number][0] == "FAILED":
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                found[number] = {"failed": said[number][2] if number in said else f"it ended with {last[:200]}"}
                continue
            network = _llama.read(folder)
            _llama.fill(network, Path(place) / f"{number}.safetensors")
            perplexity = TEXT[model].perplexity(network, folder, windows)
            if (left := _left(network, _llama.read(folder))) > 0:
                reason = f"it left {left:.0%} of the weights in 16 bits or more (perplexity {perplexity:.4f})"
                found[number] = {"failed": reason}
                continue
            seconds = float(said[number][2])
            found[number] = {
                "perplexity": perplexity,
                "bits": _packed(network, int(number), group, side),
                "seconds": seconds,
            }
    return found


def _left(network: torch.nn.Module, plain: torch.nn.Module) -> float:
    """Share of the weights in blocks that were not quantized: those that are only rounded to a float of 16 bits."""
    total = same = 0
    for (name, x), y in zip(network.named_parameters(), plain.parameters(), strict=True):
        if name.startswith("model.layers.") and x.dim() > 1:
            total += x.numel()
            if any(torch.equal(x, y.to(kind).float()) for kind in (torch.float32, torch.bfloat16, torch.float16)):
                same += x.numel()
    return same / total


def _packed(network: torch.nn.Module, bits: int, group: int, peer: str) -> float:
    """Bits per weight of a peer's layout: codes, and a scale and a zero point for each group."""
    weights = [p for name, p in network.named_parameters() if name.startswith("model.layers.") and p.dim() > 1]
    sides = sum(len(p) * math.ceil(p.shape[1] / (group or p.shape[1])) for p in weights)
    return bits + sides * (16 + (16 if peer == "hqq" else bits)) / sum(p.numel() for p in weights)
