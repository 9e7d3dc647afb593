"""What each operator of ATen does to labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from smelt.core.data import tensors
from smelt.graph.ops import contract, index, pointwise, reduce, shape

if TYPE_CHECKING:
    from smelt.graph.trace import Trace

Rule = Callable[["Trace", dict[str, Any], Any], None]
_RULES: dict[str, Rule] = {**shape.RULES, **contract.RULES, **reduce.RULES, **index.RULES, **pointwise.RULES}


def handler(t: Trace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label the results of one call of an operator."""
    inputs = list(tensors([args, kwargs]))
    outputs = list(tensors(out))
    for tensor in inputs:
        t.use(tensor)
    if not outputs:
        return
    name = func._schema.name.partition("::")[2]
    plain = name.rstrip("_") if not name.startswith("__") else name
    rule = _RULES.get(plain)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = pointwise.pointwise
    if rule is not None:
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        for a in func._schema.arguments:
            given.setdefault(a.name, a.default_value)
        rule(t, given, out)
    elif inputs:
        reason = f"it goes through {func._schema.name.replace('::', '.')} in {t.where}"
        t.stop([x for x in inputs if x.dim()], reason)
        t.stop(outputs, reason)
    else:
        for tensor in outputs:
            t.put(tensor, [f"it meets a constant of {name} in {t.where}"] * tensor.dim())
