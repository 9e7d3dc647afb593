"""Whole codes times a step for each row and one for each column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.core.encoded import Encoded, Form, numel
from smelt.core.errors import FileError
from smelt.forms._parts import FLOATS, Claims, aligned, exactly, in_layout, kind, require, whole

CODES = (torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Crossed(Form):
    """x = codes * step * 2^((rows + columns) / octave); differentiable in step.

    codes: signed integers in the tensor's shape.
    step: a float, [].
    rows: int8 [n] for the n slices along dimension 0, columns: int8 [groups, k] for the k entries of each slice,
        flattened; slices of equal columns are as many as there are groups (of a convolution), one after another.
        Together they span 2^-126..2^126 at most.
    """

    octave: int = 8

    values: ClassVar[tuple[str, ...]] = ("codes",)
    aligned: ClassVar[tuple[str, ...]] = ("codes",)

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor, in float32 or wider."""
        in_layout(self, "codes", parts["codes"], shape)
        step = parts["step"].to(torch.promote_types(parts["step"].dtype, torch.float32))
        return parts["codes"].to(step.dtype) * (
            step * self.spread(parts["rows"], parts["columns"], shape).to(step.dtype)
        )

    def spread(self, rows: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
        """Float32 in the tensor's shape: what the step of each entry is multiplied by."""
        a, b = (torch.exp2(t.double() / self.octave) for t in (rows, columns))
        return (a.reshape(len(b), -1, 1) * b[:, None]).reshape(shape).float()

    def check(self, parts: Claims, shape: torch.Size, dtype: torch.dtype) -> None:
        whole(self, "octave", self.octave, 1, 64)
        exactly(self, parts, shape, "codes", "step", "rows", "columns")
        aligned(self, parts, "codes", CODES, shape)
        require(dtype.is_floating_point, f"form 'crossed' cannot store {dtype}")
        require(kind(self, parts, "step", FLOATS) == torch.Size(), "form 'crossed' has one step")
        rows, columns = (kind(self, parts, name, (torch.int8,)) for name in ("rows", "columns"))
        fits = len(shape) > 0 and numel(shape) > 0 and rows == shape[:1] and len(columns) == 2
        fits = fits and columns[1] == numel(shape[1:]) and columns[0] > 0 and not shape[0] % columns[0]
        require(fits, f"form 'crossed': steps {list(rows)} and {list(columns)} do not fit the tensor {list(shape)}")

    def awake(self, encoded: Encoded) -> Encoded:
        """Raises FileError: steps too large or too small for a float."""
        rows, columns = encoded.parts["rows"], encoded.parts["columns"]
        if isinstance(rows, Tensor) and isinstance(columns, Tensor):
            most = int(rows.short().abs().max()) + int(columns.short().abs().max())
            if most > 126 * self.octave:
                raise FileError(f"form 'crossed': steps of 2^{most / self.octave:g}")
        return encoded
