"""A target is a unique tensor of a model, with all the places where it stands.

Tied weights and shared modules are one target with several places, and stay tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from smelt.core.errors import ModelError, RecipeError, nearest


@dataclass(frozen=True, eq=False)
class Target:
    """`name` is the first place, e.g. 'fc1.weight'; `places` are (module path, tensor name)."""

    name: str
    places: tuple[tuple[str, str], ...]
    tensor: Tensor
    module: nn.Module
    parameter: bool

    @property
    def is_weight(self) -> bool:
        """A floating parameter of two or more dimensions: what compression means by default."""
        return self.parameter and self.tensor.dim() >= 2 and self.tensor.is_floating_point()

    def __str__(self) -> str:
        return f"{self.name} {list(self.tensor.shape)}"


def targets(model: nn.Module, *, transient: bool = False) -> list[Target]:
    """Every parameter and persistent buffer, each once, in the order of the model; with `transient`, every buffer."""
    found: dict[int, tuple[str, list[tuple[str, str]], Tensor, nn.Module, bool]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        hidden = set() if transient else module._non_persistent_buffers_set
        own = [(n, p, True) for n, p in module._parameters.items() if p is not None]
        own += [(n, b, False) for n, b in module._buffers.items() if b is not None and n not in hidden]
        for name, tensor, parameter in own:
            full = f"{path}.{name}" if path else name
            entry = found.setdefault(id(tensor), (full, [], tensor, module, parameter))
            entry[1].append((path, name))
    return [Target(full, tuple(places), t, m, p) for full, places, t, m, p in found.values()]


def select(everything: Sequence[Target], on: str | Sequence[str], *, all_kinds: bool = False) -> list[Target]:
    """The targets that a selector names.

    A pattern is matched against tensor names ('fc1.weight') and module paths ('fc1', 'layer4.*', which mean
    the weights below).  A pattern that ends in a bare '*' selects weights, that is floating parameters of two
    or more dimensions; others are reached by naming them: '*.bias'.  '!pattern' takes away again.

    Args:
        all_kinds: let a pattern ending in '*' select every tensor (lossless codecs).

    Raises:
        RecipeError: a pattern that matches nothing.
    """
    patterns = [on] if isinstance(on, str) else list(on)
    chosen: dict[str, Target] = {}
    if not patterns or all(p.startswith("!") for p in patterns):
        patterns = ["*", *patterns]
    for pattern in patterns:
        bare = pattern.lstrip("!")
        hits = [t for t in everything if _matches(t, bare, all_kinds)]
        if not hits:
            near = nearest(bare, [n for t in everything for n in (t.name, t.name.rpartition(".")[0]) if n])
            raise RecipeError(f"the selector {pattern!r} matches no tensor of the model{near}")
        for target in hits:
            if pattern.startswith("!"):
                chosen.pop(target.name, None)
            else:
                chosen[target.name] = target
    return [t for t in everything if t.name in chosen]


def _matches(target: Target, pattern: str, all_kinds: bool) -> bool:
    wanted = all_kinds or target.is_weight
    for path, name in target.places:
        full = f"{path}.{name}" if path else name
        if fnmatchcase(full, pattern) and (wanted or not pattern.endswith("*")):
            return True
        parents = [path] + [path[:i] for i, c in enumerate(path) if c == "."]
        if wanted and any(parent and fnmatchcase(parent, pattern) for parent in parents):
            return True
    return False


def check_finite(everything: Sequence[Target]) -> None:
    """Raise ModelError naming the first parameter with NaN or infinite values; a buffer may hold -inf, as masks do."""
    for target in everything:
        if not (target.parameter and target.tensor.is_floating_point()):
            continue
        byte = target.tensor.element_size() == 1  # of which torch cannot tell
        finite = torch.isfinite(target.tensor.float() if byte else target.tensor)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise ModelError(f"{target} holds {bad} NaN or infinite values; a model to compress must be finite")


def check_usable(model: nn.Module) -> None:
    """Raise ModelError for tensors that hold no values yet: on the meta device, or of lazy modules."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name} is not initialised; run one batch through the model first")
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device and holds no values; load weights first")
