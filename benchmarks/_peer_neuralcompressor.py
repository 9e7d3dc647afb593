"""Intel Neural Compressor; see `_peer.py`."""

from __future__ import annotations

from typing import Any

from _peer import main
from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, RTNConfig, convert, prepare
from torch import Tensor


def _run(model: Any, config: Any, rows: Tensor, **how: Any) -> Any:
    model = prepare(model, config, **how)
    for row in rows:
        model(row[None])
    return convert(model)


def rtn(model: Any, bits: int, group: int, rows: Tensor) -> Any:
    config = RTNConfig(bits=bits, group_size=group or -1, use_sym=False, use_layer_wise=False)
    return _run(model, config, rows[:0])


def gptq(model: Any, bits: int, group: int, rows: Tensor) -> Any:
    return _run(model, GPTQConfig(bits=bits, group_size=group or -1, use_sym=False), rows)


def awq(model: Any, bits: int, group: int, rows: Tensor) -> Any:
    config = AWQConfig(bits=bits, group_size=group or -1, use_sym=False)
    return _run(model, config, rows, example_inputs=rows[:1])


if __name__ == "__main__":
    main({"rtn": rtn, "gptq": gptq, "awq": awq})
