"""A cursor over bytes that may be damaged, and the integers that streams are made of."""

from __future__ import annotations

import numpy as np

VARINT = 7  # bytes of a varint, at most


def require(ok: bool, reason: str) -> None:
    """Raises ValueError(reason) unless ok."""
    if not ok:
        raise ValueError(reason)


def varint(number: int) -> bytes:
    """Unsigned LEB128: 7 bits a byte, the lowest first, 128 added to every byte but the last."""
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


class Reader:
    """Takes bytes from `data`, uint8 [n], one after the other.  Raises ValueError where there are too few."""

    __slots__ = ("at", "data", "size")

    def __init__(self, data: np.ndarray):
        self.data = data
        self.size = data.size
        self.at = 0

    @property
    def left(self) -> int:
        return int(self.size - self.at)

    def take(self, count: int) -> np.ndarray:
        """The next `count` bytes, uint8 [count], not copied."""
        if count > self.size - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def rest(self) -> np.ndarray:
        return self.take(self.left)

    def byte(self) -> int:
        return int(self.take(1)[0])

    def varint(self) -> int:
        number = 0
        for place in range(VARINT):
            byte = self.byte()
            number |= (byte & 127) << 7 * place
            if byte < 128:
                return number
        raise ValueError(f"a number of more than {VARINT} bytes")
