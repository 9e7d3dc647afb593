"""One run of llm-compressor, in its own environment.

    python _llmcompressor.py MODEL METHOD PATTERN IDS.npy OUT.safetensors

prints the seconds that `oneshot` took.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, method, pattern, ids, out = sys.argv[1:]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = np.load(ids)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    structure = {} if pattern == "none" else {"mask_structure": pattern}
    recipe = modifier(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"], **structure)
    start = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=256, num_calibration_samples=len(rows))
    print("SECONDS", time.perf_counter() - start)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out)


if __name__ == "__main__":
    main()
