"""Entropy coding at the speed of memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Lossless, State
from smelt.core.settings import setting
from smelt.forms import entropy as form


@dataclass(frozen=True)
class Entropy(Lossless):
    """Writes every leaf in about as many bits as its entropy, without loss, and decodes it as fast as memory allows.

    Floating numbers are cut into exponents, which are coded, and the rest, which is stored; numbers that would fit a
    narrower dtype exactly are found.  Chunks of a million elements each take whichever is smallest: rANS (alias
    method, vectors), several tables, Huffman codes, bytes as they are.

    applies to: every leaf at rest: bf16, fp16, fp32 weights, indices, integer codes, gaps, masks
    needs a pretrained model: no
    needs data: no
    needs training: no
    good at: everything that is written to a file; used by every .smelt file
    bad at: leaves of a few bytes; numbers whose bits are all equally likely
    source: Duda 2013, arXiv:1311.2540; Giesen 2014, arXiv:1402.3392
    """

    coder: str = setting(
        "auto",
        "rans is smallest; huffman decodes faster where a processor has no vectors; auto takes the smaller",
        choices=("auto", "rans", "huffman"),
    )

    def encode(self, x: Tensor, state: State) -> Encoded:
        return form.encode(x, self.coder)
