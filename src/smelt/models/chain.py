"""A chain of ordinary layers from plain data: [["Linear", {"in_features": 4, "out_features": 2}], ["ReLU", {}]]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from smelt.core.errors import ModelError, nearest
from smelt.core.named import first_line

LAYERS = (
    *("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d"),
    *("BatchNorm1d", "BatchNorm2d", "LayerNorm", "GroupNorm"),
    *("ReLU", "ReLU6", "LeakyReLU", "GELU", "SiLU", "Hardswish", "Tanh", "Sigmoid", "Softmax", "LogSoftmax"),
    *("MaxPool1d", "MaxPool2d", "AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d"),
    *("Identity", "Flatten", "Unflatten", "Dropout"),
)


def build(layers: Sequence[Any] = ()) -> nn.Module:
    """A Sequential of torch.nn layers, named '0', '1', ...

    Args:
        layers: [class, {argument: value}] each, or the class alone; classes are those in `LAYERS`.

    Raises:
        ModelError: no layers, a class that is not allowed, arguments it does not take; naming the layer.
    """
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
        raise ModelError(f'chain: layers is {layers!r}; it takes a list such as [["Flatten", {{}}], ["ReLU", {{}}]]')
    return nn.Sequential(*(_layer(entry, f"chain: layer {i}") for i, entry in enumerate(layers)))


def _layer(entry: Any, where: str) -> nn.Module:
    kind, arguments = (entry, {}) if isinstance(entry, str) else (*entry, {})[:2] if _plain(entry) else (None, None)
    if not isinstance(kind, str) or not isinstance(arguments, Mapping):
        raise ModelError(f'{where} is {entry!r}; it takes ["Linear", {{"in_features": 4, "out_features": 2}}]')
    if kind not in LAYERS:
        raise ModelError(f"{where}: no layer {kind!r}{nearest(kind, LAYERS)}")
    try:
        return getattr(nn, kind)(**arguments)  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{where}: {kind} does not take {dict(arguments)}: {first_line(error)}") from None


def _plain(entry: Any) -> bool:
    return isinstance(entry, Sequence) and len(entry) in (1, 2)
