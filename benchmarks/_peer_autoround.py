"""AutoRound; see `_peer.py`.  The method is the number of iterations."""

from __future__ import annotations

import sys
from typing import Any

from _peer import main
from auto_round import AutoRound
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer


def autoround(model: Any, bits: int, group: int, rows: Tensor) -> Any:
    data = DataLoader([{"input_ids": row} for row in rows], batch_size=8)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(sys.argv[1]),
        bits=bits,
        group_size=group or -1,
        sym=False,
        iters=int(sys.argv[2]),
        dataset=data,
        seqlen=rows.shape[1],
        nsamples=len(rows),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    return rounding.quantize()[0]


if __name__ == "__main__":
    main({sys.argv[2]: autoround})
