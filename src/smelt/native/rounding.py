"""The loops of rounding.c, called with tensors' addresses."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from typing import Any

from smelt.native import library

_X = (c_void_p, c_int, c_int64)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "round_encode": (None, (*_X, c_int, c_int64, c_uint32, c_int, c_void_p, c_void_p, c_void_p)),
    "round_decode": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int64, c_void_p, c_int)),
    "mask_above": (c_int64, (*_X, c_float, c_void_p)),
    "mask_keep": (None, (*_X, c_void_p, c_int, c_void_p)),
    "mask_gather": (None, (*_X, c_void_p, c_int, c_void_p)),
    "mask_scatter": (None, (*_X, c_void_p, c_int, c_void_p)),
}


@functools.cache
def functions() -> dict[str, Any] | None:
    """By name; None where the library was not built."""
    found = {name: getattr(library(), f"smelt_{name}", None) for name in _FUNCTIONS}
    if not all(found.values()):
        return None
    for name, function in found.items():
        function.restype, function.argtypes = _FUNCTIONS[name]  # type: ignore[union-attr]
    return found
