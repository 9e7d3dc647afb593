from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smelt.core.method import Composite
from smelt.core.settings import setting


@dataclass(frozen=True)
class Awq(Composite):
    """Whole numbers of few bits, after what matters to the outputs was scaled up, so that rounding hurts it less.

    Stands for two steps: `swap.equalize` with `by: search` (channels are scaled by s = mean|x|^alpha of what is read,
    alpha from a grid of 20, by the error of the layers' outputs with weights of these bits), then `quantize.affine`
    with the range of each group shrunk where that has less error.

    applies to: linear layers behind a norm or another linear layer are scaled; every weight is stored
    needs a pretrained model: yes
    needs data: some batches without labels
    needs training: no
    good at: 4 and 3 bits of large language models, in a minute, with little danger of fitting the calibration data
    bad at: 2 bits; layers before which nothing can be scaled, which are rounded to the nearest
    source: Lin et al. 2023, arXiv:2306.00978
    """

    bits: int = setting(4, "bits per value", low=2, high=8)
    group: int = setting(128, "values per group", low=1, high=1 << 31)
    symmetric: bool = setting(False, "levels mirrored at 0")
    range: str = setting("mse", "range that the levels of a group span", choices=("minmax", "mse"))
    scales: str = setting("float16", "how scales are stored", choices=("float32", "float16", "bfloat16"))

    def steps(self) -> list[Any]:
        same = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        affine = {**same, "per": "group", "range": self.range, "scales": self.scales}
        return [{"swap.equalize": {**same, "by": "search"}}, {"quantize.affine": affine}]
