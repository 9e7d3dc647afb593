"""Any leaf as a stream of the entropy coder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.core.errors import FileError
from smelt.forms._parts import Claims, exactly, kind, require, whole
from smelt.native import stream as streams

KINDS = {torch.bool: "bool", torch.bfloat16: "e8", torch.float16: "e5", torch.float32: "e8", torch.float64: "e11"}
KINDS |= {torch.complex64: "e8", torch.complex128: "e11"}


@dataclass(frozen=True)
class Entropy(Form):
    """Lossless: elements `start` to `start` + numel - 1 of the stream that docs/format.md describes.

    stream: uint8 [bytes].  Without its own count it holds just this tensor; with one, several may share it.  Its
    length bounds what it may claim, see `least`.
    """

    start: int = 0

    values: ClassVar[tuple[str, ...]] = ("stream",)
    sealed: ClassVar[bool] = True

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The leaf, bit for bit.  Raises FileError: the stream is damaged."""
        stream = parts["stream"]
        self.check({"stream": (stream.shape, stream.dtype)}, shape, dtype)
        dense = torch.empty(shape, dtype=dtype)
        self.decode_into(stream.detach().cpu().contiguous().numpy(), dense, numel(shape))
        return dense.to(stream.device)

    def decode_into(
        self,
        stream: NDArray[np.uint8] | streams.Stream,
        out: Tensor,
        count: int,
        begin: int = 0,
        threads: int | None = None,
    ) -> None:
        """Elements from `begin` on, of the `count` of this tensor, into a contiguous one on the CPU.

        Args:
            stream: its bytes, or what `opened` gave.
            threads: as many decode; by default as many as torch uses, 0: as many as there are cores.

        Raises:
            FileError: the stream is damaged.
        """
        words = elements(out)
        each = words.size // out.numel() if out.numel() else 1
        try:
            found = stream if isinstance(stream, streams.Stream) else opened(stream, each * (self.start + count))
            require(found.width == words.itemsize or not words.size, f"entropy stream of {found.width} bytes each")
            threads = torch.get_num_threads() if threads is None else threads
            found.decode_into(words, each * (self.start + begin), threads)
        except ValueError as error:
            raise FileError(f"entropy stream: {error}") from None
        if out.dtype is torch.bool and bool((words > 1).any()):
            raise FileError("entropy stream: truth values other than 0 and 1")

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        exactly(self, parts, shape, "stream")
        whole(self, "start", self.start, 0, 1 << 48)
        size = kind(self, parts, "stream", (torch.uint8,))
        fits = len(size) == 1 and size[0] >= least(self.start + numel(shape), dtype)
        require(fits, f"form 'entropy': {list(size)} bytes cannot hold {list(shape)} {dtype} from {self.start} on")

    def awake(self, encoded: Encoded) -> Tensor:
        return encoded.decode()


def opened(stream: NDArray[np.uint8], count: int) -> streams.Stream:
    """The stream of a leaf.  Raises FileError or ValueError: it is damaged.

    count: how many numbers one that does not say it has.
    """
    found = streams.Stream(stream, count)
    require(found.checks or len(stream) < streams.SMALL, "entropy stream without checksums")
    require(not stream[found.nbytes :].any(), "entropy stream: bytes left over")
    return found


def encode(x: Tensor, coder: str) -> Encoded:
    """A leaf as a stream that holds it alone.

    coder: "rans", "huffman", or "auto" (see `code.entropy`).
    """
    dense = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
    fewest, threads = least(x.numel(), x.dtype), torch.get_num_threads()
    packed = streams.encode(elements(dense), kind_of(x.dtype), coder=coder, counted=False, threads=threads)
    if len(packed) < fewest:  # zeros will follow
        checks = fewest >= streams.SMALL
        packed = streams.encode(
            elements(dense), kind_of(x.dtype), coder=coder, checks=checks, counted=False, ends=True, threads=threads
        )
        packed = np.pad(packed, (0, max(0, fewest - len(packed))))
    return Encoded(Entropy(), {"stream": torch.from_numpy(packed)}, x.shape, x.dtype)


def least(count: int, dtype: torch.dtype) -> int:
    """Fewest bytes of a stream of `count` elements: 1/8 of uint8, 1/2048 of others; zeros fill it up to that.

    It binds where elements are all the same.  One byte of a uint8 leaf may stand for 255 elements of a sparse
    tensor (a gap); so no byte of a file claims more than 2048 elements.
    """
    return -(-count * dtype.itemsize // (8 if dtype is torch.uint8 else 2048))


def kind_of(dtype: torch.dtype) -> str:
    """What the coder should take elements of this dtype for (see `smelt.native.stream.encode`)."""
    if dtype.is_floating_point and dtype.itemsize == 1 and dtype is not getattr(torch, "float8_e8m0fnu", None):
        return "f8"
    return KINDS.get(dtype, "int")


def elements(x: Tensor) -> NDArray[Any]:
    """A contiguous tensor on the CPU as flat unsigned words, without a copy; a complex element is two of them."""
    width = x.element_size() // (2 if x.dtype.is_complex else 1)
    if not x.numel():
        return np.empty(0, f"u{width}")
    return x.detach().reshape(-1).view(torch.uint8).numpy().view(f"u{width}")
