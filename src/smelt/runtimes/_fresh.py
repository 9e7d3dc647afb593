"""What a runtime takes of memory: in a process that does nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smelt.core.data import forward
from smelt.core.errors import DataError, ModelError
from smelt.core.runtime import open_session
from smelt.formats import smelt as smelt_file
from smelt.measures.resident import resident
from smelt.models._open import open_model

START = "import ast, sys; task = ast.literal_eval(sys.stdin.read()); sys.path[:] = task['path']; " + (
    "from smelt.runtimes import _fresh; print(_fresh.grown(task))"
)


def fresh_memory(again: Mapping[str, Any], runtime: str, inputs: Any, threads: int = 1, trust: bool = False) -> int:
    """Bytes by which a fresh process grows at most that loads what `again` says and runs `inputs` twice.

    Args:
        again: {file} or {builder, arguments}; where a `.smelt` file names no builder of ours, also {into: {builder,
            arguments}}.
        inputs: a tensor, or a tuple or dict of them.

    Raises:
        ModelError: it fails there, or the system does not tell.
    """
    flat, kind = _flat(inputs)
    with tempfile.TemporaryDirectory(prefix="smelt-") as scratch:
        path = Path(scratch) / "inputs.safetensors"
        save_file({str(i): x.contiguous() for i, x in enumerate(flat)}, path)
        task = {"again": dict(again), "runtime": runtime, "inputs": str(path), "kind": kind, "threads": threads}
        task |= {"trust": trust, "path": sys.path}
        done = subprocess.run([sys.executable, "-c", START], input=repr(task), capture_output=True, text=True)
    words = done.stdout.split()
    if done.returncode or not words or not words[-1].isdigit():
        why = (done.stderr.strip() or f"it ends with {words[-1:]} and status {done.returncode}").splitlines()[-1]
        raise ModelError(f"a fresh process cannot measure its memory: {why}")
    return int(words[-1])


def grown(task: Mapping[str, Any]) -> int | None:
    """The work of the fresh process."""
    flat = load_file(task["inputs"])
    inputs = _nested([flat[str(i)] for i in range(len(flat))], task["kind"])
    torch.set_num_threads(task["threads"])

    def work() -> None:
        session = open_session(task["runtime"], _source(task["again"], task["trust"]), task["threads"])
        for _ in range(2):
            forward(session, inputs)

    return resident(work)


def _source(again: Mapping[str, Any], trust: bool) -> Path | nn.Module:
    if "builder" in again:
        return open_model(again["builder"], arguments=again["arguments"])[0].eval()
    path = Path(again["file"])
    if path.suffix != ".smelt":
        return path
    into = _source(again["into"], trust) if again.get("into") else None
    assert not isinstance(into, Path)
    return smelt_file.load(path, into, trust=trust)


def _flat(inputs: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a batch, and how they are nested: None, a number (of a tuple), or names (of a dict)."""
    if isinstance(inputs, Tensor):
        return [inputs], None
    values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    if not all(isinstance(value, Tensor) for value in values):
        raise DataError("inputs are a tensor, or a tuple or dict of tensors")
    return values, list(inputs) if isinstance(inputs, Mapping) else len(values)


def _nested(flat: list[Tensor], kind: Any) -> Any:
    if kind is None:
        return flat[0]
    return tuple(flat) if isinstance(kind, int) else dict(zip(kind, flat, strict=True))
