"""llm-compressor; see `_peer.py`.  Its AWQ wants pinned memory, which there is only beside an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from _peer import main
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from torch import Tensor


def gptq(model: Any, bits: int, group: int, rows: Tensor) -> Any:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "channel"}
    if group:
        weights |= {"strategy": "group", "group_size": group}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["re:.*lm_head"])
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(rows))
    return model


if __name__ == "__main__":
    main({"gptq": gptq})
