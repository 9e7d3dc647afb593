"""A layer as several thinner ones: which layers can be split, how the parts are built, and whether it pays.

linear       [out, in]                    Linear
conv         [out, in, kh, kw]            Conv1d or Conv2d, along some of the axes of the layer that it stands for
embedding    [entries, width]             Embedding
chain        these one after another, in place of the layer; the last one has its bias
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.clock import latencies
from smelt.core.data import evaluating, forward_or_raise, tensors
from smelt.core.edit import Replace
from smelt.core.target import Target

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Runs of a layer and of what would take its place, when they are compared; the first ones do not count.
RUNS, WARMUP = 20, 3


@dataclass(frozen=True)
class Part:
    """One layer of a chain: torch.nn.<kind>(**arguments) without a bias, and its weight."""

    kind: str
    arguments: Mapping[str, Any]
    weight: Tensor


def refusal(target: Target, kinds: tuple[type[nn.Module], ...] = LAYERS) -> str | None:
    """Why nothing can take the place of the layer of this weight, or None; `graph.reads.outside` knows of others."""
    path, name = target.places[0]
    module = target.module
    if type(module) not in kinds or name != "weight":
        known = {nn.Linear: "linear", nn.Conv1d: "1-D", nn.Conv2d: "2-D convolution", nn.Embedding: "embedding"}
        words = " or ".join(known[kind] for kind in kinds)
        return f"it is no weight of a {words} layer but of {type(module).__name__}"
    if getattr(module, "groups", 1) != 1:
        return f"the convolution has {module.groups} groups; it must have one"
    if getattr(module, "max_norm", None) is not None:
        return f"the embedding holds its entries to a norm of {module.max_norm}; factors cannot"
    if len(target.places) > 1:
        return "its weight is shared with " + ", ".join(".".join(place) for place in target.places[1:])
    if module._forward_hooks or module._forward_pre_hooks:
        return "a hook acts on the layer (a codec at its input or output, say) and would be lost; put this step before"
    return None if path else "it is the whole model; put the layer into a module"


def linear(weight: Tensor) -> Part:
    """weight: [out, in]."""
    return Part("Linear", {"in_features": weight.shape[1], "out_features": weight.shape[0]}, weight)


def embedding(module: nn.Embedding, weight: Tensor) -> Part:
    """weight: [entries, width], of the layer's entries in another width."""
    arguments = {
        "num_embeddings": weight.shape[0],
        "embedding_dim": weight.shape[1],
        "padding_idx": module.padding_idx,
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "sparse": module.sparse,
    }
    return Part("Embedding", {k: v for k, v in arguments.items() if v not in (None, False)}, weight)


def conv(module: nn.Conv1d | nn.Conv2d, weight: Tensor, axes: Iterable[int] = (), groups: int = 1) -> Part:
    """A convolution that does the layer's part along `axes` (0 first of the kernel): its stride, padding and dilation.

    Args:
        weight: [out, in / groups, *kernel], of kernel size 1 along every other axis.
    """
    own = set(axes)
    settings: dict[str, Any] = {
        "in_channels": weight.shape[1] * groups,
        "out_channels": weight.shape[0],
        "kernel_size": list(weight.shape[2:]),
    }
    for name, other in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value: Any = getattr(module, name)
        if isinstance(value, str):
            settings[name] = value if own else 0
        else:
            settings[name] = [v if axis in own else other for axis, v in enumerate(value)]
    if own:
        settings["padding_mode"] = module.padding_mode
    if groups > 1:
        settings["groups"] = groups
    return Part(type(module).__name__, settings, weight)


def chain(target: Target, parts: Sequence[Part], bias: Tensor | None = None) -> Replace:
    """The edit that puts `parts`, one after another, in the place of the layer, in the dtype of its weight.

    Args:
        bias: in place of the layer's own; a layer without one does not get it.
    """
    own: Any = getattr(target.module, "bias", None)
    values = {f"{i}.weight": part.weight for i, part in enumerate(parts)}
    if own is not None:
        values[f"{len(parts) - 1}.bias"] = own.detach() if bias is None else bias
    layers = [_layer(part, own is not None and i == len(parts) - 1) for i, part in enumerate(parts)]
    return Replace(target.places[0][0], "chain", {"layers": layers}, _values(target, values))


def pivoted(target: Target, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Replace:
    """The same as `chain` of the `pair` of left [m, r] and right [r, n], with r^2 fewer numbers.

    The outputs whose rows of `left` come first in its QR decomposition with pivoting are given, the others combined.
    """
    from scipy.linalg import qr

    rank = left.shape[1]
    first = qr(left.T.double().cpu().numpy(), mode="r", pivoting=True)[1][:rank]
    given = torch.zeros(len(left), dtype=torch.bool)
    given[torch.from_numpy(first).long()] = True
    order = torch.empty(len(left), dtype=torch.int32)
    order[given] = torch.arange(rank, dtype=torch.int32)
    order[~given] = torch.arange(rank, len(left), dtype=torch.int32)
    given = given.to(left.device)
    mixed: Tensor = torch.linalg.solve(left[given], left[~given], left=False)
    parts = pair(target, mixed, left[given] @ right)
    values = {"first.weight": parts[0].weight, "rest.weight": parts[1].weight}
    own: Any = getattr(target.module, "bias", None)
    if own is not None:
        whole = (own.detach() if bias is None else bias).to(mixed)
        values |= {"first.bias": whole[given], "rest.bias": whole[~given] - mixed @ whole[given]}
    arguments = {name: _layer(part, own is not None) for name, part in zip(("first", "rest"), parts, strict=True)}
    return Replace(target.places[0][0], "pivoted", arguments, {**_values(target, values), "order": order})


def beside(target: Target, edit: Replace, weight: Tensor) -> Replace:
    """`edit`, and a layer of the same kind with this weight, of the layout of the target's; their outputs are added.

    They are the submodules '0' and '1'.
    """
    module: Any = target.module
    if isinstance(module, nn.Embedding):
        part = embedding(module, weight)
    elif isinstance(module, nn.Linear):
        part = linear(weight)
    else:
        part = conv(module, weight, range(weight.dim() - 2))
    kind, arguments = _layer(part, False)
    branches = [[edit.builder, dict(edit.arguments)], ["layer", {"kind": kind, "arguments": arguments}]]
    values = {f"0.{name}": value for name, value in edit.values.items()} | _values(target, {"1.weight": weight})
    return Replace(edit.path, "sum", {"branches": branches}, values)


def _layer(part: Part, bias: bool) -> list[Any]:
    return [part.kind, {**part.arguments, **({} if part.kind == "Embedding" else {"bias": bias})}]


def _values(target: Target, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    like = target.tensor.detach()
    return {k: v.to(like).clone(memory_format=torch.contiguous_format) for k, v in values.items()}


def numbers(parts: Sequence[Part]) -> int:
    """Entries of the weights of all parts."""
    return sum(part.weight.numel() for part in parts)


def larger(target: Target, count: int, what: str) -> str | None:
    """Why the layer stays dense: `what` ('rank 3', say) would need `count` weights, and that is no less."""
    dense = target.tensor.numel()
    return f"{what} would need {count:,} weights, it has {dense:,}" if count >= dense else None


def matrix(module: nn.Module, weight: Tensor, spatial: bool = False) -> Tensor:
    """A tensor in the layout of the layer's weight as the matrix that `pair` splits, [m, n].

    linear [out, in]; embedding [width, entries]; convolution [out, in * kernel], or with `spatial`, for a 2-D one,
    [in * kh, out * kw].
    """
    if isinstance(module, nn.Embedding):
        return weight.T
    if spatial:
        return weight.permute(1, 2, 0, 3).reshape(weight.shape[1] * weight.shape[2], -1)
    return weight.flatten(1)


def folded(module: nn.Module, found: Tensor, shape: torch.Size, spatial: bool = False) -> Tensor:
    """The inverse of `matrix`, for a weight of this shape."""
    if isinstance(module, nn.Embedding):
        return found.T
    if spatial:
        return found.reshape(shape[1], shape[2], shape[0], shape[3]).permute(2, 0, 1, 3)
    return found.reshape(shape)


def pair(target: Target, left: Tensor, right: Tensor, spatial: bool = False) -> list[Part]:
    """Two layers that give what the layer would with left [m, r] @ right [r, n] as its `matrix`."""
    module, shape, rank = target.module, target.tensor.shape, right.shape[0]
    if isinstance(module, nn.Embedding):
        return [embedding(module, right.T), linear(left)]
    if isinstance(module, nn.Linear):
        return [linear(right), linear(left)]
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    if spatial:
        first = left.reshape(shape[1], shape[2], rank).permute(2, 0, 1)[:, :, :, None]
        second = right.reshape(rank, shape[0], shape[3]).transpose(0, 1)[:, :, None, :]
        return [conv(module, first, [0]), conv(module, second, [1])]
    dims = len(shape) - 2
    return [
        conv(module, right.reshape(rank, *shape[1:]), range(dims)),
        conv(module, left.reshape(*left.shape, *[1] * dims)),
    ]


def places(model: nn.Module, found: Sequence[Target], example: Any) -> dict[str, tuple[int, int]]:
    """Name of a weight -> at how many places its layer is laid for one batch: (of the first of a `spatial` pair, else).

    Zero for what is not called, and for an embedding, which multiplies nothing.
    """
    counts = {t.name: (0, 0) for t in found}

    def called(target: Target, x: Tensor, y: Tensor) -> None:
        if isinstance(target.module, nn.Embedding):
            return
        size = y.numel() // target.tensor.shape[0]
        first = size // y.shape[-1] * x.shape[-1] if isinstance(target.module, nn.Conv2d) else size
        before = counts[target.name]
        counts[target.name] = (before[0] + first, before[1] + size)

    with ExitStack() as hooks, evaluating(model):
        for target in found:

            def hook(_: nn.Module, args: Any, out: Any, target: Target = target) -> None:
                called(target, next(tensors(args)), next(tensors(out)))

            hooks.callback(model.get_submodule(target.places[0][0]).register_forward_hook(hook).remove)
        forward_or_raise(model, example, "on the example")
    return counts


class Speed:
    """Compares layers with what would take their place, on what they are called with for one batch.

    Raises:
        ModelError: the forward pass fails.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], example: Any):
        self.model = model
        self._calls: dict[str, tuple[Any, Any]] = {}
        with ExitStack() as hooks, evaluating(model):
            for path in dict.fromkeys(paths):

                def called(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                    self._calls.setdefault(path, (args, kwargs))

                module = model.get_submodule(path)
                hooks.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
            forward_or_raise(model, example, "on the example")

    @torch.no_grad()
    def milliseconds(self, edit: Replace) -> tuple[float, float] | None:
        """Medians of alternating runs of the layer and of what would take its place; None where it is not called."""
        if edit.path not in self._calls:
            return None
        args, kwargs = self._calls[edit.path]
        old = self.model.get_submodule(edit.path)
        holder = nn.Sequential()
        holder.layer = old
        Replace("layer", edit.builder, edit.arguments, edit.values).apply(holder)
        new = holder.get_submodule("layer")
        with evaluating(old), evaluating(new):
            took = latencies({"old": lambda: old(*args, **kwargs), "new": lambda: new(*args, **kwargs)}, RUNS, WARMUP)
        return took["old"].median, took["new"].median

    def slower(self, edit: Replace) -> str | None:
        """Why the layer stays dense: it would be no faster; None where it is, or is not called."""
        before, after = self.milliseconds(edit) or (1.0, 0.0)
        return f"it would take {after:.3g} ms in place of {before:.3g} ms" if after >= before else None
