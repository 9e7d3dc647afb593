"""Mixtures of experts: where the experts are, in a list or stacked, and which layer routes to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

_TOP = re.compile(r"top_?k|per_tok", re.IGNORECASE)
_NUMBER = re.compile(r"expert", re.IGNORECASE)


@dataclass(frozen=True)
class Mixture:
    """Paths, from the model, of the module that holds all (`path`), of the experts and of the router.

    stacked: names of the parameters of the module `experts` whose first dimension counts the experts; empty where
        `experts` is a ModuleList with one member for each.
    weight: name of the router's parameter [number, features].
    top: how many experts a token gets, as far as an attribute says.
    """

    path: str
    experts: str
    router: str
    weight: str
    number: int
    stacked: tuple[str, ...] = ()
    top: int | None = None


def mixtures(model: nn.Module) -> tuple[list[Mixture], dict[str, str]]:
    """(the mixtures in the order of the model, why a module with stacked parameters is none: path -> reason)."""
    found: list[Mixture] = []
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        parts = [(path, module), *((join(path, n), c) for n, c in module.named_children() if not _alone(c, ""))]
        for place, part in parts:
            number, stacked = _experts(part)
            if number < 2 or (part is module and not stacked) or any(m.experts == place for m in found):
                continue
            routers = list(_routers(module, path, place, number))
            if part is module and not routers:  # one of the module's own parameters may route
                routers = [(path, n) for n in stacked if getattr(module, n).dim() == 2]
                stacked = tuple(n for n in stacked if getattr(module, n).dim() > 2)
            if len(routers) == 1:
                router, weight = routers[0]
                holders = [model.get_submodule(p) for p in (router, path, place)]
                top = next((v for holder in holders for v in _named(holder, _TOP).values()), None)
                found.append(Mixture(path, place, router, weight, number, stacked, top))
            elif stacked:
                said = ", ".join(join(r, w) for r, w in routers) or "none"
                reasons[place] = f"one router of [{number}, features] is looked for beside its {number} experts: {said}"
    taken = {m.experts for m in found}
    return found, {path: reason for path, reason in reasons.items() if path not in taken}


def _alone(module: nn.Module, path: str) -> bool:
    """Whether a module with stacked parameters holds the layer that routes to them, too."""
    number, stacked = _experts(module)
    return bool(stacked) and len(list(_routers(module, path, path, number))) == 1


def _experts(module: nn.Module) -> tuple[int, tuple[str, ...]]:
    """(number, names of the stacked parameters); 0 where there are none."""
    if isinstance(module, nn.ModuleList):
        shapes = [(type(member), [(n, p.shape) for n, p in member.named_parameters()]) for member in module]
        same = bool(shapes) and bool(shapes[0][1]) and all(shape == shapes[0] for shape in shapes)
        return (len(shapes) if same else 0), ()
    own = _own(module)
    deep = {len(p) for p in own.values() if p.dim() == 3}
    if len(deep) != 1 or type(module).__module__.startswith("torch.nn."):
        return 0, ()
    (number,) = deep
    return number, tuple(n for n, p in own.items() if p.dim() > 1 and len(p) == number)


def _routers(module: nn.Module, path: str, experts: str, number: int) -> Iterator[tuple[str, str]]:
    """(path, name of the weight) of the layers below a module, experts left out, that could route."""
    for name, part in module.named_modules():
        place, own = join(path, name), _own(part)
        if not name or place == experts or (experts != path and place.startswith(f"{experts}.")):
            continue
        flat = [n for n, p in own.items() if p.dim() == 2]
        if len(flat) == 1 and all(p.dim() < 3 and len(p) == number for p in own.values() if p.dim()):
            yield place, flat[0]


def _own(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False))


def counts(module: nn.Module, number: int) -> list[str]:
    """Attributes that say how many experts there are."""
    return [name for name, value in _named(module, _NUMBER).items() if value == number]


def _named(module: nn.Module, pattern: re.Pattern[str]) -> dict[str, int]:
    return {n: v for n, v in vars(module).items() if type(v) is int and pattern.search(n) and not n.startswith("_")}


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
