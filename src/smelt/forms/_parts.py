"""What the checks of several forms share: the claims of a file, judged before anything is decoded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.core.errors import FileError

Claims = Mapping[str, "tuple[torch.Size, torch.dtype]"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BYTES = (torch.float8_e4m3fn, torch.float8_e5m2)  # floats of one byte
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def require(holds: bool, message: str) -> None:
    """Raise FileError(message) unless it holds."""
    if not holds:
        raise FileError(message)


def exactly(form: Form, parts: Claims, shape: torch.Size, *names: str) -> None:
    """The form has just these parts, and no size is negative or overflows, even where another is 0."""
    same = set(parts) == set(names)
    require(same, f"form {form.name!r} has the parts {', '.join(names)}, not {', '.join(sorted(parts)) or 'none'}")
    for size in (shape, *(part for part, _ in parts.values())):
        sane = len(size) <= 64 and all(n >= 0 for n in size) and math.prod(max(1, n) for n in size) < 1 << 56
        require(sane, f"form {form.name!r}: {list(size)} is no shape")


def kind(form: Form, parts: Claims, name: str, dtypes: Collection[torch.dtype]) -> torch.Size:
    """The shape of a part, which must have one of these dtypes."""
    shape, dtype = parts[name]
    require(dtype in dtypes, f"form {form.name!r}: its part {name!r} cannot be {dtype}")
    return shape


def aligned(form: Form, parts: Claims, name: str, dtypes: Collection[torch.dtype], shape: torch.Size) -> None:
    """The part has one entry per element: in the tensor's layout, or flat with the masked ones dropped at rest."""
    own = kind(form, parts, name, dtypes)
    flat = len(own) == 1 and own[0] <= numel(shape)
    require(own == shape or flat, f"form {form.name!r}: its part {name!r} is {list(own)}, the tensor {list(shape)}")


def in_layout(form: Form, name: str, part: Tensor | Encoded, shape: torch.Size) -> None:
    """The part is awake: it has exactly the tensor's shape."""
    if part.shape != shape:
        raise FileError(f"form {form.name!r}: its part {name!r} is {list(part.shape)}, the tensor {list(shape)}")


def whole(form: Form, name: str, value: Any, low: int, high: int) -> None:
    """A field that a file gives is an integer in low..high."""
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(good, f"form {form.name!r}: {name} is {value!r}, not an integer in {low}..{high}")


def as_tensor(data: np.ndarray, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Bytes, a fresh flat array of just the right number, as a tensor."""
    return torch.from_numpy(data).view(dtype).reshape(shape) if data.size else torch.empty(shape, dtype=dtype)
