"""What the scripts share that quantize a language model by another library, each in an environment of its own.

    python _peer_NAME.py FOLDER METHOD BITS[,BITS...] GROUP IDS.npy OUT

For each number of bits the model is read anew, the linear layers of its blocks are quantized with GROUP weights to a
scale (0: a whole row), and OUT/BITS.safetensors holds its tensors with the weights as they act.  Prints a line
`DONE bits seconds`, CPU seconds of quantizing alone, or `FAILED bits reason`.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# (model, bits, group, ids [n, length]) -> the quantized model
Quantize = Callable[[Any, int, int, Tensor], Any]


def main(methods: Mapping[str, Quantize], load: Callable[[str, int, int], Any] | None = None) -> None:
    folder, method, every, group, ids, out = sys.argv[1:]
    torch.set_num_threads(1)
    rows = torch.from_numpy(np.load(ids))
    for bits in map(int, every.split(",")):
        torch.manual_seed(0)
        try:
            plain = read(folder)
            model = load(folder, bits, int(group)) if load else read(folder)
            start = time.process_time()
            done = methods[method](model, bits, int(group), rows)
            seconds = time.process_time() - start
            save_file(_dense(plain, done), Path(out) / f"{bits}.safetensors")
            print("DONE", bits, seconds, flush=True)
        except Exception as error:
            traceback.print_exc()
            print("FAILED", bits, f"{type(error).__name__}: {error}".replace("\n", " ")[:200], flush=True)


def read(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _dense(plain: nn.Module, done: nn.Module) -> dict[str, Tensor]:
    """The tensors of `plain` as `done` has them; a layer of another kind says what its weight is by its outputs."""
    left = done.state_dict()
    tensors = {name: left.get(name, tensor).detach().float().clone() for name, tensor in plain.state_dict().items()}
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.Linear) and type(found := done.get_submodule(path)) is not nn.Linear:
            every = torch.eye(layer.in_features)
            origin = found(torch.zeros_like(every))
            tensors[f"{path}.weight"] = (found(every) - origin).T.float().contiguous()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
