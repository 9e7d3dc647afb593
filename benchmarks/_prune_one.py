"""One model, one side, in a process of its own: prune half of the channels, run, save, load, compare.

Memory and processor time are capped, so that a side that wants more fails alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _torchvision
import torch
from _zoo import build
from torch import nn

import smelt
from smelt.core.data import forward, logits_of
from smelt.core.errors import SmeltError
from smelt.core.store import store_of
from smelt.measures.macs import macs
from smelt.measures.parameters import parameters

MEMORY = 6 << 30  # bytes that a process may hold
SECONDS = 120  # of the processor that it may use
HANGS = 1800  # seconds after which a process that does nothing is ended
RATIO = 0.5
NUMBERS = ("num_heads", "num_attention_heads", "n_heads")  # what attention calls them
# Folders of smelt whose errors are refusals: what decides how to cut.  An error from elsewhere is a failure.
DECIDE = ("methods", "graph")
Make = Callable[[], tuple[nn.Module, Any]]


def ours(make: Make) -> dict[str, Any]:
    model, inputs = make()
    job = smelt.Job(data=smelt.Data(train=[(inputs, None)]), latency=False)
    step = {"prune.channels": {"ratio": RATIO, "scope": "local", "score": "magnitude", "repair": "none"}}
    start = time.perf_counter()
    try:
        result = smelt.compress(model, {"steps": [step]}, job)
    except SmeltError as error:
        passed = {Path(frame.filename).parts[-3:] for frame in traceback.extract_tb(error.__traceback__)}
        if any(part in folders for folders in passed for part in DECIDE):
            return {"refused": str(error)}
        raise
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.smelt"
        size = result.save(path)
        loaded = smelt.load(path, into=make()[0])
    found = compared(model, result.model, loaded, inputs)
    edits = len(store_of(result.model).edits)
    return {**found, "bytes": size, "seconds": seconds, "edits": edits, "notes": result.report.notes}


def theirs(make: Make) -> dict[str, Any]:
    """Torch-Pruning as its documentation and its examples for timm, torchvision, BERT and Llama use it."""
    import torch_pruning as tp

    model, inputs = make()
    before, _ = make()
    heads, halves = _heads(model)
    language = any(name.endswith("self_attn") for name, _ in model.named_modules())
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=_classifiers(model, inputs),
        num_heads=heads,
        prune_num_heads=language,  # its Llama example: whole heads go, so that the rotation stays as it is
        prune_head_dims=not language,
        head_pruning_ratio=RATIO if language else 0.0,
        out_channel_groups=halves,
        round_to=model.encoder.layers[0].num_heads if hasattr(model, "conv_proj") else None,  # its torchvision example
        output_transform=lambda outputs: logits_of(outputs).sum(),
    )
    pruner.step()
    _tell_modules(model, pruner.num_heads)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(model, path)
        loaded = torch.load(path, weights_only=False)
        found = compared(before, model, loaded, inputs)
        return {**found, "bytes": path.stat().st_size, "seconds": seconds}


def _heads(model: nn.Module) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """Projections -> their number of heads, as its examples find them; fused gate and up projections -> 2."""
    heads: dict[nn.Module, int] = {}
    halves: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        count = next((n for name in NUMBERS if isinstance(n := getattr(module, name, None), int)), None)
        few = count
        if hasattr(module, "q_proj") and config is not None:
            count = count or getattr(config, "num_attention_heads", None)
            few = getattr(config, "num_key_value_heads", None) or count
        if isinstance(count, int):
            names = dict.fromkeys(("qkv", "qkv_proj", "q", "query", "q_proj"), count)
            names |= dict.fromkeys(("k", "key", "k_proj", "v", "value", "v_proj"), few)
            for name, number in names.items():
                if isinstance(layer := getattr(module, name, None), (nn.Linear, nn.Conv2d)):
                    heads[layer] = number
        if isinstance(layer := getattr(module, "gate_up_proj", None), nn.Linear):
            halves[layer] = 2
    return heads, halves


def _classifiers(model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers that make the classes, which its documentation says to leave alone."""
    with torch.no_grad():
        classes = logits_of(forward(model, inputs)).shape[-1]
    made = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [m for m in made if classes == _width(m)]


def _width(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _tell_modules(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """What its examples set by hand after pruning: numbers and widths of heads, the width of a transformer."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, share in (("qkv", 3), ("qkv_proj", 3), ("query", 1), ("q_proj", 1), ("q", 1)):
            layer = getattr(module, name, None)
            if layer not in heads:
                continue
            width = _width(layer) // share
            for number in NUMBERS:
                if isinstance(getattr(module, number, None), int):
                    setattr(module, number, heads[layer])
            for size in ("head_dim", "attention_head_size", "key_value_proj_dim"):
                if isinstance(getattr(module, size, None), int):
                    setattr(module, size, width // heads[layer])
            for whole in ("attn_dim", "all_head_size", "inner_dim"):
                if isinstance(getattr(module, whole, None), int):
                    setattr(module, whole, width)
            if isinstance(getattr(module, "num_key_value_groups", None), int):
                few = heads.get(module.k_proj, 0)
                module.num_key_value_groups = heads[layer] // max(1, few)
        if hasattr(module, "hidden_dim") and hasattr(module, "conv_proj"):
            module.hidden_dim = module.conv_proj.out_channels
        if config is not None and hasattr(module, "lm_head") and hasattr(config, "hidden_size"):
            config.hidden_size = module.lm_head.in_features


@torch.no_grad()
def compared(before: nn.Module, after: nn.Module, loaded: nn.Module, inputs: Any) -> dict[str, Any]:
    """Whether the pruned model runs and the loaded one is the same; its size and work before and after."""
    old, new, again = (logits_of(forward(model.eval(), inputs)) for model in (before, after, loaded))
    if new.shape != old.shape:
        raise ValueError(f"the output was {list(old.shape)} and is {list(new.shape)}")
    if not bool(torch.isfinite(new).all()):
        raise ValueError("the output is not finite")
    if not torch.equal(new, again):
        raise ValueError("the loaded model's output is not the pruned one's")
    return {
        "parameters": (parameters(before), parameters(after)),
        "macs": (_macs(before, inputs), _macs(after, inputs)),
    }


def _macs(model: nn.Module, inputs: Any) -> int | None:
    try:
        return macs(model, inputs)
    except Exception:  # an operator that torch's counter cannot count
        return None


def _late(*_: Any) -> None:
    raise TimeoutError(f"it had used {SECONDS} s of the processor and not ended")


def alone(send: Connection, library: str, name: str, pixels: int, side: str) -> None:
    """The body of the process: send what was found."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    signal.signal(signal.SIGXCPU, _late)
    warnings.simplefilter("ignore")

    def make() -> tuple[nn.Module, Any]:
        return build(library, name, pixels)

    try:
        found = (ours if side == "smelt" else theirs)(make)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        found = {"error": f"{type(error).__name__}: {line}"[:300], "at": f"{Path(where.filename).name}:{where.lineno}"}
    send.send({**found, "megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)})


def run(library: str, name: str, pixels: int, side: str) -> dict[str, Any]:
    """What is found; {'error': ...} where the process ends without an answer.  It is forked, so it need not import."""
    _torchvision.prepare()
    for library_of_models in ("timm", "torchvision", "transformers", "torch_pruning"):
        importlib.import_module(library_of_models)
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=alone, args=(send, library, name, pixels, side))
    process.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv() if receive.poll(HANGS) else {"error": f"it hung for {HANGS} s"}
    except EOFError:
        found = {}
    process.kill()
    process.join()
    return found or {"error": f"its process ended with {process.exitcode}"}
