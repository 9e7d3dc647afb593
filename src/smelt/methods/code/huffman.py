"""Huffman coding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smelt.core.encoded import Encoded
from smelt.core.method import Lossless, State
from smelt.forms import entropy as form


@dataclass(frozen=True)
class Huffman(Lossless):
    """Codes frequent symbols in fewer bits, without loss: canonical Huffman codes of at most 12 bits.

    Symbols are bytes, or the upper bits of a number (of floating ones the exponent), whose rest is stored as it is.
    The file is the same as that of `code.entropy`, whose other coders are not used.

    applies to: every leaf at rest: weights, indices, integer codes, masks, gaps
    needs a pretrained model: no
    needs data: no
    needs training: no
    good at: skewed frequencies: indices, codes of few bits, gaps, exponents; decoding without vector instructions
    bad at: below one bit per symbol (code.entropy is not), mantissas, tensors of a few bytes
    source: Huffman 1952, doi:10.1109/JRPROC.1952.273898; limit: Larmore & Hirschberg 1990, doi:10.1145/79147.79150
    """

    def encode(self, x: Tensor, state: State) -> Encoded:
        return form.encode(x, "huffman")
