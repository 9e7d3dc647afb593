"""The functions that may stand between two layers of a chain, where each unit (neuron or channel) goes its own way.

elementwise   every element alike                              relu, dropout in evaluation mode
pool          over the positions of a channel                  max, average, mean over all positions
flatten       channels times positions become features
channelwise   a module with tensors of one entry per channel   batch norm, depthwise convolution
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

# f(c x) = c f(x) for every c > 0.
HOMOGENEOUS = ("relu", "leakyrelu", "prelu", "identity", "dropout")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink),
    *(nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)
_NAMES = (
    *("relu", "leaky_relu", "relu6", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "sigmoid", "logsigmoid"),
    *("hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign"),
    *("threshold", "dropout", "dropout1d", "dropout2d"),
)
_POOLS = tuple(f"{kind}_pool{d}d" for d in (1, 2) for kind in ("max", "avg", "adaptive_max", "adaptive_avg"))
_METHODS = ("relu", "tanh", "sigmoid", "contiguous", "clone")


def _written(names: tuple[str, ...]) -> dict[Any, str]:
    """Function -> its name without underscores, for all places that hold it."""
    return {
        getattr(home, form): name.replace("_", "")
        for name in names
        for home in (torch, functional)
        for form in (name, f"{name}_")
        if hasattr(home, form)
    }


_FUNCTIONS, _POOL_FUNCTIONS = _written(_NAMES), _written(_POOLS)
_POOL_MODULES = tuple(getattr(nn, f"{kind}Pool{d}d") for d in (1, 2) for kind in ("Max", "Avg", "AdaptiveMax"))
_POOL_MODULES += (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_FLATTEN = (torch.flatten, "flatten")


@dataclass(frozen=True)
class Step:
    """One function, as in evaluation mode.

    name: such as 'relu', 'maxpool2d', 'batchnorm2d', 'conv2d' (depthwise), 'flatten', 'mean'.
    kind: 'elementwise', 'pool', 'flatten' or 'channelwise'.
    module, path: of a channelwise one.
    zeros: it takes in zeros from beyond the borders, so that a constant channel does not stay constant.
    """

    name: str
    kind: str
    apply: Callable[[Tensor], Tensor]
    module: nn.Module | None = None
    path: str = ""
    zeros: bool = False

    @property
    def homogeneous(self) -> bool:
        """f(c x) = c f(x) for every c > 0."""
        return self.name in HOMOGENEOUS or self.kind in ("pool", "flatten")


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def pads(module: nn.Module) -> bool:
    """Whether a convolution lays its kernel over zeros beyond the borders."""
    return any(getattr(module, "_reversed_padding_repeated_twice", ())) and module.padding_mode == "zeros"


def of_module(module: nn.Module, path: str, units: int) -> Step | None:
    """What a module does to `units` neurons or channels, or None if it is not known to keep them apart."""
    name = type(module).__name__.lower()
    if type(module) in _MODULES and not (isinstance(module, nn.PReLU) and module.weight.numel() > 1):
        same = name.startswith("dropout")
        return Step("dropout" if same else name, "elementwise", _same if same else module)
    if type(module) in NORMS and module.num_features == units and module.running_mean is not None:
        return Step(name, "channelwise", module, module, path)
    if type(module) in CONVOLUTIONS and module.groups == module.in_channels == module.out_channels == units:
        return Step(name, "channelwise", module, module, path, pads(module))
    if type(module) in _POOL_MODULES and not getattr(module, "return_indices", False):
        counts = bool(getattr(module, "count_include_pad", False)) and any(_pair(module.padding))
        return None if getattr(module, "divisor_override", None) else Step(name, "pool", module, zeros=counts)
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return Step(name, "flatten", module)
    return None


def of_node(node: fx.Node, before: fx.Node) -> Step | None:
    """What a called function or method does to `before`, or None if it is not known to keep units apart."""
    rest, options, target = node.args[1:], dict(node.kwargs), node.target
    if node.op == "call_function" and target in _FUNCTIONS:
        function, name = cast("Callable[..., Tensor]", target), _FUNCTIONS[target]
        same = name.startswith("dropout")
        return Step(
            "dropout" if same else name, "elementwise", _same if same else lambda x: function(x, *rest, **options)
        )
    if node.op == "call_function" and target in _POOL_FUNCTIONS:
        function, name = cast("Callable[..., Tensor]", target), _POOL_FUNCTIONS[target]
        return None if _odd_pool(name, rest, options) else Step(name, "pool", lambda x: function(x, *rest, **options))
    if node.op == "call_method" and (name := str(target).rstrip("_")) in _METHODS:
        same = name in ("contiguous", "clone")
        apply = _same if same else lambda x: getattr(x, name)(*rest, **options)
        return Step("identity" if same else name, "elementwise", apply)
    if target in _FLATTEN and rest + tuple(options.values()) in ((1,), (1, -1)):
        return Step("flatten", "flatten", lambda x: x.flatten(1))
    if target in ("view", "reshape") and len(rest) == 2 and rest[1] == -1 and counts_batch(rest[0], before):
        return Step("flatten", "flatten", lambda x: x.flatten(1))
    if target in ("mean", torch.mean):
        dims = rest[0] if rest else options.get("dim")
        keep = bool(rest[1] if len(rest) > 1 else options.get("keepdim", False))
        if isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]:
            apply = cast("Callable[..., Tensor]", lambda x: x.mean((2, 3), keepdim=keep))
            return Step("mean", "pool" if keep else "flatten", apply)
    return None


def counts_batch(node: Any, x: fx.Node) -> bool:
    """Whether a node is x.size(0), x.size()[0] or x.shape[0]: how many samples there are, whatever the units."""
    if not isinstance(node, fx.Node):
        return False
    if _item(node):
        return bool(node.args[1] == 0 and node.args[0] in x.users and _sizes(node.args[0]))
    return _sizes(node) and node.args == (x, 0)


def asks_for_batch(node: fx.Node, x: fx.Node) -> bool:
    """Whether a user of x wants to know no more than the number of samples."""
    return counts_batch(node, x) or (_sizes(node) and all(counts_batch(user, x) for user in node.users))


def _sizes(node: Any) -> bool:
    return (node.op == "call_method" and node.target == "size") or (
        node.target is getattr and node.args[1:] == ("shape",)
    )


def _item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _odd_pool(name: str, rest: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a pooling function does more than take maxima or means of the windows inside."""
    if "max" in name:
        return bool(options.get("return_indices"))
    return len(rest) > 2 or any(_pair(options.get("padding", 0))) or bool(options.get("divisor_override"))


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _same(x: Tensor) -> Tensor:
    return x
