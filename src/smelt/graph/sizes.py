"""Where the numbers in a forward pass come from: an attribute of a module, the length of a dimension, or the code."""

from __future__ import annotations

from typing import Any

from smelt.graph.labels import Attribute, Axis

Source = Attribute | Axis


class Size(int):
    """An int that knows where it comes from, as do its sums, differences, products and quotients.

    source: the attribute that it was read from, or the axis whose length it is; None where it was computed:
    made: ('+', '-', '*' or '//', left, right), or None where it was computed in another way.
    numbers: where the sources are noted that are used as more than a size.
    """

    source: Source | None
    made: tuple[str, int, int] | None
    numbers: list[Source]

    def __new__(
        cls, value: int, source: Source | None, numbers: list[Source], made: tuple[str, int, int] | None = None
    ) -> Size:
        size = super().__new__(cls, value)
        size.source, size.numbers, size.made = source, numbers, made
        return size

    @property
    def constant(self) -> bool:
        """The length of an axis that stays."""
        return isinstance(self.source, str)

    def _then(self, value: Any, sign: str = "", left: Any = 0, right: Any = 0) -> Any:
        if value is NotImplemented:
            return value
        whole = sign and isinstance(left, int) and isinstance(right, int)
        return Size(value, None, self.numbers, (sign, left, right) if whole else None)

    def __mul__(self, other: Any) -> Any:
        return self._then(int.__mul__(self, other), "*", self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._then(int.__floordiv__(self, other), "//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._then(int.__rfloordiv__(self, other))

    def __add__(self, other: Any) -> Any:
        return self._then(int.__add__(self, other), "+", self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._then(int.__sub__(self, other), "-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._then(int.__rsub__(self, other))

    def __mod__(self, other: Any) -> Any:
        return self._then(int.__mod__(self, other))

    def __rmod__(self, other: Any) -> Any:
        return self._then(int.__rmod__(self, other))

    def __neg__(self) -> Any:
        return self._then(int.__neg__(self))

    def __float__(self) -> float:
        self.as_number()
        return int.__float__(self)

    def __truediv__(self, other: Any) -> Any:
        self.as_number()
        return int.__truediv__(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        self.as_number()
        return int.__rtruediv__(self, other)

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        self.as_number()
        return int.__pow__(self, other, mod) if isinstance(other, int) else int.__float__(self) ** other

    def as_number(self) -> None:
        """Note that this is used as more than a size: results change with it."""
        if self.source is not None:
            self.numbers.append(self.source)
        for part in self.made[1:] if self.made else ():
            if isinstance(part, Size):
                part.as_number()

    def __copy__(self) -> Size:
        return self

    def __deepcopy__(self, memo: Any) -> Size:
        return self

    def __reduce__(self) -> Any:
        return int, (int.__index__(self),)
