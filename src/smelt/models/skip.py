"""Stands where a module was taken out: what it is given goes on as what the module returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.edit import PLAIN
from smelt.core.errors import ModelError

RETURNS = ("x", "zeros", None)


def build(returns: Any = "x", argument: str = "", attributes: Mapping[str, Any] | None = None) -> nn.Module:
    """A module without tensors, called as the one whose place it takes.

    Args:
        returns: 'x' for its first argument, 'zeros' for zeros of that shape; a list of these and None for a tuple.
        argument: name of the first argument, for calls by keywords only.
        attributes: plain values that others read from it.

    Raises:
        ModelError: another kind of return, or an attribute that is not plain or that every module has.
    """
    several = isinstance(returns, Sequence) and not isinstance(returns, str)
    kinds = list(returns) if several else [returns]
    if not kinds or any(kind not in RETURNS for kind in kinds):
        raise ModelError(f"skip: returns is {returns!r}; it takes 'x', 'zeros', or a list of these and None")
    made = Skip(kinds, several, argument)
    for name, value in (attributes or {}).items():
        if not name.isidentifier() or name.startswith("_") or hasattr(made, name) or not isinstance(value, PLAIN):
            raise ModelError(f"skip: the attribute {name!r} cannot be {value!r}")
        setattr(made, name, value)
    return made


class Skip(nn.Module):
    def __init__(self, kinds: Sequence[str | None], several: bool, argument: str):
        super().__init__()
        self._kinds, self._several, self._argument = tuple(kinds), several, argument

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0] if args else kwargs[self._argument]
        found = [None if kind is None else x if kind == "x" else torch.zeros_like(x) for kind in self._kinds]
        return tuple(found) if self._several else found[0]

    def extra_repr(self) -> str:
        return ", ".join(map(str, self._kinds))
