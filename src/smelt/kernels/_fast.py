"""A model whose layers run from their stored form, where that was measured to be faster here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.core.clock import latencies
from smelt.core.data import evaluating, forward_or_raise, move
from smelt.core.edit import put_module
from smelt.core.errors import ModelError
from smelt.core.kernel import Layer, Served, build, kernels
from smelt.core.store import Activation, Store, has_store, store_of
from smelt.core.target import targets
from smelt.kernels._matvec import settle
from smelt.kernels._verdicts import Verdict, Verdicts, key

# A kernel must take at most this share of the dense layer's time: differences below it are the clock's.
FASTER = 0.95
REPEATS, WARMUP = 15, 3
# Samples up to which a kernel for few of them is tried.
MOST = 64

Shapes = Mapping[str, torch.Size]


def fast(model: nn.Module, example: Any, *, rounds: bool = False, cache: str | Path | None = None) -> nn.Module:
    """A copy of a model for inference, whose layers run from their stored form where a kernel is faster than dense.

    Each layer that ran on `example` is timed dense and as every kernel that can serve it, on this machine, for the
    input that it got and the threads that torch has; what is not faster stays dense.  Verdicts are kept in a file and
    not measured twice.  Tensors that stay dense are shared with the model.

    Outputs differ from the dense model's by rounding: inputs of layers of even levels count in 16 bits, an error of
    about 3e-5 of the outputs; in 8 bits with `rounds`, or where a codec at a layer's input rounds to them anyway.

    Args:
        example: inputs as the model takes them: a tensor, a tuple, a dict.  Its batch size counts: kernels for a single
            sample differ from those for many.
        rounds: also let kernels round inputs to 8 bits, in a range found at run time, where no codec is stored.
        cache: the file of verdicts; nothing: kernels.json in SMELT_CACHE, else in the user's folder for caches.

    Raises:
        ModelError: the model fails on the example.
    """
    copied = shared_copy(model)
    with evaluating(copied):
        shapes = shapes_of(copied, example)
        serve(copied, shapes, rounds=rounds, cache=cache)
    return copied.eval()


def verdicts(model: nn.Module) -> dict[str, Verdict]:
    """What was measured of the layers of a model that `fast` gave, by path."""
    return dict(model.__dict__.get("_smelt_kernels", {}))


def shared_copy(model: nn.Module) -> nn.Module:
    """The same modules again, with the same tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    if has_store(model):
        for entry in store_of(model).entries.values():
            memo.update((id(leaf), leaf) for _, leaf in entry.encoded.leaves())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # a module may hold anything
        raise ModelError(f"{type(model).__name__} cannot be copied: {error}") from error


def shapes_of(model: nn.Module, example: Any) -> dict[str, torch.Size]:
    """The shape of the first input of each layer that has a stored weight, in a forward pass."""
    found: dict[str, torch.Size] = {}
    handles = []
    for path, module in layers(model):

        def record(_: nn.Module, inputs: tuple[Any, ...], path: str = path) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                found.setdefault(path, inputs[0].shape)

        handles.append(module.register_forward_pre_hook(record))
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    try:
        forward_or_raise(model, move(example, str(device)), "on the example")
    finally:
        for handle in handles:
            handle.remove()
    return found


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with a stored weight, by path; not those that torch's own layers look into."""
    stored = store_of(model).entries if has_store(model) else {}
    weights = {path for t in targets(model) if t.name in stored for path, name in t.places if name == "weight"}
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0]) if path else model
        inside = type(parent).__module__.startswith("torch.nn.modules.") and not isinstance(parent, CONTAINERS)
        if path and path in weights and not inside and not any(module.children()):
            yield path, module


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def serve(
    model: nn.Module,
    shapes: Shapes,
    *,
    rounds: bool = False,
    cache: str | Path | None = None,
    told: Mapping[str, Verdict] | None = None,
) -> dict[str, Verdict]:
    """Exchange layers of a model, by the shapes of their inputs; gives the verdicts by their keys.

    Args:
        told: verdicts that were measured before, which count unless the cache has them.
    """
    known = Verdicts(None if cache is None else Path(cache))
    known.known = {**(told or {}), **known.known}
    used: dict[str, Verdict] = {}
    held = store_of(model)
    found: dict[str, Verdict] = {}
    names = {path: t.name for t in targets(model) for path, name in t.places if name == "weight"}
    left = {path: module for path, module in layers(model) if path in shapes}
    for path, module in left.items():
        layer = Layer(module, held.entries[names[path]].encoded, shapes[path], _at_input(held, path), rounds)
        found[path], served = judge(layer, known)
        used[key(layer, next(module.parameters()).device.type)] = found[path]
        if served is not None:
            _exchange(model, held, path, module, served)
    settle(model)
    still = {t.name for t in targets(model)}
    held.entries = {name: entry for name, entry in held.entries.items() if name in still}
    model.__dict__["_smelt_kernels"] = found
    return used


def _at_input(held: Store, path: str) -> Activation | None:
    found = [one for one in held.activations if one.path == path and one.at == "input"]
    if len(found) > 1:
        return replace(found[0], codec=_SEVERAL)
    return found[0] if found else None


class _Several:
    """Stands for codecs one after another, which no kernel knows."""

    name = "several"


_SEVERAL: Any = _Several()


def _exchange(model: nn.Module, held: Store, path: str, old: nn.Module, new: Served) -> None:
    """Put a served layer in a layer's place, with its hooks but that of the codec that it acts as."""
    taken = [a for a in held.activations if new.takes_input and a.path == path and a.at == "input"]
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        for number, hook in getattr(old, kind).items():
            if getattr(hook, "__self__", None) not in taken:
                getattr(new, kind)[number] = hook
    held.activations = [a for a in held.activations if not any(a is one for one in taken)]
    put_module(model, path, new.train(old.training))


def judge(layer: Layer, known: Verdicts) -> tuple[Verdict, Served | None]:
    """What serves a layer best, measured or remembered, and the layer as it does; None where dense is as good."""
    weight = next(layer.module.parameters())
    device = weight.device.type
    name = key(layer, device)
    verdict = known.known.get(name)
    if verdict is not None:
        if verdict.kernel is None:
            return verdict, None
        served = build(verdict.kernel, layer) if verdict.kernel in kernels(device) else None
        if served is not None:
            served.most = verdict.most
            return verdict, served
    able = {one: served for one in kernels(device) if (served := build(one, layer)) is not None}
    verdict = _measured(layer, able)
    known.keep(name, verdict)
    best = able.get(verdict.kernel or "")
    if best is not None:
        best.most = verdict.most
    return verdict, best


def _measured(layer: Layer, able: dict[str, Served]) -> Verdict:
    if not able:
        return Verdict(None)
    times = _times(layer, able, layer.shape)
    best = min(able, key=lambda one: times[one])
    if times[best] > FASTER * times["dense"]:
        return Verdict(None, times)
    return Verdict(best, times, _most(layer, best, able[best]))


def _times(layer: Layer, able: Mapping[str, Served], shape: torch.Size) -> dict[str, float]:
    weight = next(layer.module.parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    sides: dict[str, Any] = {"dense": lambda: layer.module.forward(x)}
    sides |= {name: (lambda served=served: served.forward(x)) for name, served in able.items()}
    with torch.no_grad():
        return {name: took.median for name, took in latencies(sides, REPEATS, WARMUP).items()}


def _most(layer: Layer, name: str, served: Served) -> int | None:
    """Samples up to which a kernel for few of them is faster, found by doubling."""
    if not served.few:
        return None
    features = layer.shape[-1]
    most = max(1, layer.shape.numel() // features)
    while most < MOST:
        times = _times(layer, {name: served}, torch.Size((2 * most, features)))
        if times[name] > FASTER * times["dense"]:
            break
        most *= 2
    return most
