"""One ordinary layer from plain data, where a layer gets a tensor that it did not have: a bias, weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from smelt.core.errors import ModelError, nearest
from smelt.core.named import first_line
from smelt.models.chain import LAYERS

KINDS = (*LAYERS, "ConvTranspose3d")


def build(kind: str = "Identity", arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """torch.nn.<kind>(**arguments).

    Raises:
        ModelError: a layer that is not in `KINDS`, or arguments it does not take.
    """
    if kind not in KINDS:
        raise ModelError(f"layer: no layer {kind!r}{nearest(str(kind), KINDS)}")
    try:
        return getattr(nn, kind)(**(arguments or {}))  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"layer: {kind} does not take {arguments}: {first_line(error)}") from None
