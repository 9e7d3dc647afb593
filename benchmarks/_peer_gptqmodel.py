"""GPTQModel; see `_peer.py`."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # else it takes none where there are few processors

import torch
from _peer import main
from gptqmodel import GPTQModel, QuantizeConfig
from torch import Tensor


def load(folder: str, bits: int, group: int) -> Any:
    # In its first format whole zero points are off by one until the model is written and read again.
    kind = {"sym": False, "format": "gptq_v2", "device": "cpu", "offload_to_disk": False}
    config = QuantizeConfig(bits=bits, group_size=group or -1, **kind)
    return GPTQModel.load(folder, config, torch_dtype=torch.float32)


def gptq(model: Any, bits: int, group: int, rows: Tensor) -> Any:
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=8)
    return model.model


if __name__ == "__main__":
    main({"gptq": gptq}, load)
