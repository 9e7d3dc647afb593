"""Which hidden layers of a student stand beside which of its teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import evaluating, forward_or_raise
from smelt.core.errors import DataError, nearest


@dataclass(frozen=True)
class Place:
    """What one module gave, once, in a forward pass.

    depth: share of the layers (modules without modules) that had run by then.
    """

    path: str
    shape: torch.Size
    depth: float

    @property
    def size(self) -> tuple[int, ...]:
        """All but the samples and the width: pixels of images, tokens of texts."""
        return tuple(self.shape[2:]) if len(self.shape) > 3 else tuple(self.shape[1:-1])

    @property
    def width(self) -> int:
        return self.shape[1] if len(self.shape) > 3 else self.shape[-1]


def hidden(output: Any) -> Tensor | None:
    """The floating tensor [n, ...] in what a module gives: itself, or the first of a tuple or list."""
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 1 else None


def places(model: nn.Module, inputs: Any) -> list[Place]:
    """Modules that run once and give a hidden tensor, in the order in which they finish; not the model itself.

    Raises:
        ModelError: the forward pass fails.
    """
    ran: list[tuple[str, torch.Size | None, int]] = []
    leaves = 0

    def see(path: str, module: nn.Module, output: Any) -> None:
        nonlocal leaves
        leaves += not any(True for _ in module.children())
        found = hidden(output)
        ran.append((path, None if found is None else found.shape, leaves))

    hooks = [
        module.register_forward_hook(lambda m, _, out, path=path: see(path, m, out))
        for path, module in model.named_modules()
        if path
    ]
    try:
        with evaluating(model):
            forward_or_raise(model, inputs, "while hidden layers are paired")
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(path for path, _, _ in ran)
    return [
        Place(path, shape, at / max(leaves, 1)) for path, shape, at in ran if shape is not None and times[path] == 1
    ]


def named(student: Sequence[Place], teacher: Sequence[Place], pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """(student's, teacher's place) for each pair of names or patterns.

    Patterns that name several modules pair them in the order in which they run, at even distances where the teacher
    has more or fewer.

    Raises:
        DataError: a pattern that names no hidden layer.
    """
    found = []
    for own, other in pairs:
        left, right = (
            _matching(side, name, who) for side, name, who in ((student, own, "model"), (teacher, other, "teacher"))
        )
        found += [(one, right[-(-(i + 1) * len(right) // len(left)) - 1]) for i, one in enumerate(left)]
    return found


def _matching(side: Sequence[Place], pattern: str, who: str) -> list[Place]:
    found = [place for place in side if fnmatchcase(place.path, pattern)]
    if not found:
        near = nearest(pattern, [place.path for place in side])
        raise DataError(f"no hidden layer of the {who} is called {pattern!r}{near}")
    return found


def matched(student: Sequence[Place], teacher: Sequence[Place], count: int) -> list[Any]:
    """(student's, teacher's place) for `count` pairs, by size and depth.

    Both run through the same sizes of images, or lengths of texts.  Each size that both have gets its share of the
    pairs, the later ones first: of m pairs the i-th stands i/m of the way through the layers of that size, so a single
    one at their end.  Of modules at the same depth that with the width of the other side is taken, else the outermost.
    What comes last in either (the logits) is not hidden, and images of one pixel are no images.
    """
    student, teacher = (_before_the_end(side) for side in (student, teacher))
    sizes = [size for size in dict.fromkeys(p.size for p in student) if any(p.size == size for p in teacher)]
    found: list[Any] = []
    for i, size in enumerate(sizes):
        own, other = ([p for p in side if p.size == size] for side in (student, teacher))
        left = len(sizes) - i
        share = (count - len(found)) // left if count > len(sizes) else int(left <= count)
        for step in range(1, share + 1):
            one = _at(own, step / share)[-1]
            near = _at(other, step / share)
            pair = (one, next((p for p in reversed(near) if p.width == one.width), near[-1]))
            if pair not in found:
                found.append(pair)
    return found


def _before_the_end(side: Sequence[Place]) -> list[Place]:
    return [p for p in side if p.depth < 1 and not _pixel(p)]


def _pixel(place: Place) -> bool:
    return len(place.shape) > 3 and set(place.size) == {1}


def _at(side: Sequence[Place], share: float) -> list[Place]:
    """Those of them that stand closest to this share of the way through, all at one depth."""
    first, last = side[0].depth, side[-1].depth
    wanted = first + share * (last - first)
    best = min((p.depth for p in side), key=lambda depth: abs(depth - wanted))
    return [p for p in side if p.depth == best]
