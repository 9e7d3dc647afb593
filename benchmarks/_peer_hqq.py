"""HQQ by its authors; see `_peer.py`."""

from __future__ import annotations

from typing import Any

import torch
from _peer import main
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn


def hqq(model: Any, bits: int, group: int, rows: Tensor) -> Any:
    config = BaseQuantizeConfig(nbits=bits, group_size=group or None, axis=1)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.startswith("model.layers."):
            parent, name = path.rsplit(".", 1)
            setattr(
                model.get_submodule(parent), name, HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
            )
    return model


if __name__ == "__main__":
    main({"hqq": hqq})
