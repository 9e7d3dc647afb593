"""The compiled part: one small C library, called through ctypes, which lets other threads run meanwhile."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
import zlib
from collections.abc import Callable

import numpy as np

_P, _SIZE, _INT, _I64, _U32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_FUNCTIONS: dict[str, tuple[type, list[type]]] = {
    "smelt_chunk_bound": (_I64, [_SIZE, _INT]),
    "smelt_chunk_encode": (_I64, [_P, _SIZE, _INT, _INT, _INT, _P, _SIZE]),
    "smelt_chunk_decode": (_INT, [_P, _SIZE, _P, _SIZE, _INT, _INT]),
    "smelt_chunk_decode_checked": (_INT, [_P, _SIZE, _P, _SIZE, _INT, _INT, _U32]),
    "smelt_crc32": (_U32, [_U32, _P, _SIZE]),
    "smelt_best_level": (_INT, []),
}

LONG = 4096  # bytes; the checksum of fewer is quicker in zlib than a call


def _say(text: str) -> None:
    print(f"smelt: {text}", file=sys.stderr)


# Told, once in a process, that coding is slow.
notice: Callable[[str], None] = _say


@functools.cache
def library() -> ctypes.CDLL | None:
    """The C library, or None where it was not built (no compiler, no wheel)."""
    found = importlib.util.find_spec("smelt.native._smelt")
    if found is None or not found.origin:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
    except OSError:
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        if function := getattr(loaded, name, None):
            function.restype, function.argtypes = result, arguments
    return loaded


@functools.cache
def coder() -> ctypes.CDLL | None:
    """The library for coding, or None where there is none, which is said to `notice` once."""
    found = library()
    if found is not None and all(hasattr(found, name) for name in _FUNCTIONS):
        return found
    notice("the C library was not built (is there a C compiler?): coding and decoding are many times slower")
    return None


def crc32(data: bytes | memoryview | np.ndarray, crc: int = 0) -> int:
    """The CRC-32 (of zlib and PNG) of bytes (an array: uint8), after others whose CRC-32 is `crc`."""
    if len(data) >= LONG and (found := library()) is not None and hasattr(found, "smelt_crc32"):
        view = np.frombuffer(data, np.uint8)
        return int(found.smelt_crc32(crc, view.ctypes.data, view.size))
    return zlib.crc32(data.data if isinstance(data, np.ndarray) else data, crc)
