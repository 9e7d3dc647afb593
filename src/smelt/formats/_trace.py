"""How a model becomes a graph: its codecs at activations as operations, its stored weights known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from smelt.core.data import describe, forward
from smelt.core.encoded import Encoded
from smelt.core.errors import ModelError
from smelt.core.named import first_line
from smelt.core.store import Activation, store_of, strip
from smelt.core.target import targets
from smelt.formats._affine import grid_of
from smelt.formats._simplified import fold_norms, plain_bags
from smelt.formats._traced import Rounding, Traced, Weight, program_of, quantized
from smelt.forms.affine import Affine


def trace(model: nn.Module, inputs: Any, to: str) -> Traced:
    """The graph of a model, which is changed: its codecs at activations become operations of the graph.

    Args:
        model: in evaluation mode, on the CPU.
        to: name of the format, for messages.

    Raises:
        ModelError: the model cannot be traced, or runs operations that no graph holds.
    """
    held = store_of(model)
    entries = {name: entry.encoded for name, entry in held.entries.items()}
    activations = list(held.activations)
    strip(model)
    args, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (_positional(inputs), {})
    known = {f"{path}.{n}" if path else n: t.name for t in targets(model) for path, n in t.places}
    notes: list[str] = []
    dynamic = _mark(model, activations, notes)
    try:
        program, rows = flexible(model, args, named)
        graph = program.module(check_guards=False)
    except Exception as error:
        raise ModelError(
            f"{_failing(model, inputs) or type(model).__name__} cannot be written as {to}: torch.export fails, given "
            f"{describe(inputs)}: {first_line(error)}"
        ) from error
    assert isinstance(graph, fx.GraphModule)
    traced = Traced(graph, args, named, dynamic=dynamic, notes=notes, rows=rows)
    plain_bags(traced)
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name in used:
        encoded = entries.get(known.get(name, name))
        grid = None if encoded is None else grid_of(_matrix(encoded))
        if encoded is not None and grid is not None:
            traced.weights[name] = Weight(known.get(name, name), encoded.shape, grid)
        elif encoded is not None and known.get(name, name) == name:
            notes.append(f"{name} is stored as {encoded}, which {to} has no form for; it is written as dense values")
    fold_norms(traced)
    traced.clean()
    return traced


def _positional(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def flexible(
    model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[torch.export.ExportedProgram, bool]:
    """The program for any number of samples, or where that cannot be for as many as given; whether it is the former."""
    given = [*args, *named.values()]
    sizes = {len(t) for t in given if isinstance(t, Tensor) and t.dim()}
    if len(sizes) == 1:
        more = [_more(t) for t in given]  # a size of 1 would be taken for one that never changes
        shapes = [{0: torch.export.Dim.AUTO} if isinstance(t, Tensor) and t.dim() else None for t in given]
        try:
            if named:
                program = program_of(
                    model, (), dict(zip(named, more, strict=True)), dict(zip(named, shapes, strict=True))
                )
            else:
                program = program_of(model, tuple(more), {}, tuple(shapes))
        except Exception:  # the shapes of the model depend on the number of samples; then it is fixed
            return program_of(model, args, named, None), False
        inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and "val" in n.meta]
        if any(isinstance(size, torch.SymInt) for value in inputs for size in getattr(value, "shape", ())):
            return program, True
    return program_of(model, args, named, None), False


def _more(x: Any) -> Any:
    return torch.cat((x, x)) if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x


def _failing(model: nn.Module, inputs: Any) -> str | None:
    """Path of the innermost module that torch.export fails on with the inputs it gets here."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _, a, k, path=path: calls.__setitem__(path, (a, k)),
            with_kwargs=True,  # type: ignore[misc]
        )
        for path, m in model.named_modules()
        if path
    ]
    try:
        with torch.no_grad():
            forward(model, inputs)
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    for path in sorted(calls, key=lambda p: -p.count(".")):
        try:
            program_of(model.get_submodule(path), *calls[path], None)
        except Exception:
            return path
    return None


def _mark(model: nn.Module, activations: Sequence[Activation], notes: list[str]) -> set[str]:
    """Let modules round at the grids that are stored; returns the paths of those with ranges of each batch."""
    dynamic = set()
    for activation in activations:
        path, state = activation.path, activation.state
        if not hasattr(state, "scale"):
            dynamic.add(path)
            continue
        rounding = rounding_of(activation)
        if rounding is None:
            what = type(activation.codec).__module__.removeprefix("smelt.methods.")
            notes.append(
                f"{path}: {what} at its {activation.at} is not written; only activations of 8 bits, even steps, "
                "one scale and a whole zero are"
            )
            continue
        module = model.get_submodule(path)
        if activation.at == "input":
            module.register_forward_pre_hook(
                lambda _, given, r=rounding: (_rounded(given[0], r), *given[1:])  # type: ignore[misc]
            )
        else:
            module.register_forward_hook(lambda _, __, out, r=rounding: _rounded(out, r))  # type: ignore[misc]
    return dynamic


def rounding_of(activation: Activation) -> Rounding | None:
    """The grid of a codec at an activation, where it has one scale, a whole zero and 8 bits."""
    with torch.no_grad():
        encoded = activation.codec.encode(torch.zeros(1, 1), activation.state) if _single(activation) else None
    if encoded is None or not isinstance(encoded.form, Affine) or encoded.form.bits != 8:
        return None
    scale, zero = encoded.parts["scale"], encoded.parts.get("zero")
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        return None
    step = float(scale) / encoded.form.top
    if zero is None:
        return Rounding(step, 0, -127, 127)
    if not isinstance(zero, Tensor) or float(zero) != round(float(zero)):
        return None
    return Rounding(step, int(zero), 0, 255)


def _single(activation: Activation) -> bool:
    scale: Any = activation.state.scale
    return isinstance(scale, Tensor) and scale.numel() == 1


def _rounded(x: Any, r: Rounding) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    codes = quantized.quantize_per_tensor(x, r.scale, r.zero, r.low, r.high, r.dtype)
    return quantized.dequantize_per_tensor(codes, r.scale, r.zero, r.low, r.high, r.dtype)


def _matrix(encoded: Encoded) -> Encoded:
    """The tree with everything aligned as a matrix [dimension 0, rest], which groups run along anyway."""
    if len(encoded.shape) <= 2 or getattr(encoded.form, "axis", None) not in (None, 0):
        return encoded
    size = torch.Size((encoded.shape[0], encoded.shape[1:].numel()))
    parts: dict[str, Tensor | Encoded] = {}
    for key, part in encoded.parts.items():
        if key in encoded.form.aligned:
            parts[key] = _matrix(part) if isinstance(part, Encoded) else part.reshape(size)
        else:
            parts[key] = part
    return Encoded(encoded.form, parts, size, encoded.dtype)
