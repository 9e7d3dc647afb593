"""The codecs at saved of a training context: where they act, and which bits they give."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from smelt.core.apply import chosen
from smelt.core.errors import RecipeError
from smelt.core.method import Codec
from smelt.core.recipe import Step
from smelt.core.settings import ramps
from smelt.core.target import targets
from smelt.train.saved.shelter import Shelter
from smelt.train.saved.watch import Watch

MOST_BITS = 8


class Acting:
    """All of the pieces that are at saved, in the order of the recipe; where two act on a module, the later does.

    Args:
        step: how many optimizer steps are done.

    Raises:
        RecipeError: a setting that ramps, or measuring beside a codec that accumulates gradients.
    """

    def __init__(self, model: nn.Module, pieces: Sequence[Step], seed: int, step: Callable[[], int]):
        self.model, self.step = model, step
        self.pieces = [piece for piece in pieces if piece.at == "saved"]
        self.shelters: list[Shelter] = []
        for piece in self.pieces:
            assert isinstance(piece.act, Codec)
            for name in ramps(piece.act):
                raise RecipeError(f"{piece.key}.{name} cannot ramp at saved; give one value")
            for other in pieces:
                if piece.act.period() and isinstance(other.act, Codec) and other.act.needs_at("training"):
                    raise RecipeError(
                        f"{piece.key} at saved measures by further backward passes, which {other.key} would count; "
                        "take adapt out"
                    )
            self.shelters.append(Shelter(piece.act, seed))
        self._watches: list[Watch] = []
        self._silent = True
        self._relative: float | None = None

    def enter(self) -> None:
        for piece, shelter in zip(self.pieces, self.shelters, strict=True):
            self._watches.append(Watch(self.model, _modules(self.model, piece), shelter, self.step))

    def leave(self) -> None:
        for watch in self._watches:
            watch.remove()

    def bytes(self) -> tuple[int, int]:
        """(what the last forward pass has stored, what autograd would have)"""
        return sum(s.taken for s in self.shelters), sum(s.plain for s in self.shelters)

    def notes(self) -> list[str]:
        """What the forward passes so far have stored; said once."""
        if not self._silent or not self._watches:
            return []
        self._silent = False
        found = []
        for piece, watch in zip(self.pieces, self._watches, strict=True):
            taken, plain = watch.most
            times = f", {plain / taken:.1f} times less" if taken else ""
            found.append(f"{piece.key} at saved: {taken:,} bytes of activations where autograd saves {plain:,}{times}")
            if self._relative is not None:
                found.append(f"{piece.key} at saved: adds {100 * self._relative:.2g} % to the gradient's square norm")
        return found

    def measured(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The loss.  Where it is time, bits are given anew, by what each piece adds to the variance of its gradient."""
        for shelter in self.shelters:
            if shelter.measuring and loss.requires_grad:
                learning = list(parameters)
                costs = variances(shelter, loss, learning)
                self._relative = costs.pop(-1)
                shelter.bits = allocated(costs, shelter.given, shelter.values)
                shelter.measuring = False
        return loss

    def state(self) -> dict[str, Tensor]:
        found = {}
        for k, shelter in enumerate(self.shelters):
            pairs = sorted(shelter.bits.items())
            found[f"saved{k}/bits"] = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        for k, shelter in enumerate(self.shelters):
            if (pairs := state.get(f"saved{k}/bits")) is not None:
                shelter.bits = {int(index): int(bits) for index, bits in pairs.tolist()}


def variances(shelter: Shelter, loss: Tensor, parameters: list[nn.Parameter]) -> dict[int, float]:
    """Piece -> square of the change of the gradient when what is read of it is disturbed by as much as storing it did.

    -1 has the sum of all, over the square of the gradient.  (Z. Liu et al. 2022, arXiv:2206.11357, section 4.2.)
    """

    def slope() -> list[Tensor]:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [g.detach().float() for g in found if g is not None]

    before = slope()
    norm = sum(float(g.square().sum()) for g in before)
    costs = {}
    for index, error in shelter.errors.items():
        costs[index] = 0.0
        if error > 0:
            with shelter.disturbing(index, shelter.seed + index):
                costs[index] = sum(float((a - b).square().sum()) for a, b in zip(slope(), before, strict=True))
    costs[-1] = sum(costs.values()) / max(norm, 1e-30)
    return costs


def allocated(costs: Mapping[int, float], given: Mapping[int, int], values: Mapping[int, int]) -> dict[int, int]:
    """Bits of each piece, of as many in all as were given, at which the sum of the variances is least.

    With b bits a variance is as 1 / (2^b - 1)^2; the next bit goes where it takes away most for each value it is
    spent on.

    Args:
        costs: piece -> variance at the `given` bits.
    """
    unit = {i: cost * float((1 << given[i]) - 1) ** 2 for i, cost in costs.items()}
    bits = dict.fromkeys(unit, 1)
    left = sum(values[i] * (given[i] - 1) for i in unit)

    def gain(i: int) -> float:
        now, then = (unit[i] / float((1 << b) - 1) ** 2 for b in (bits[i], bits[i] + 1))
        return (now - then) / max(values[i], 1)

    heap = [(-gain(i), i) for i in unit]
    heapq.heapify(heap)
    while heap:
        worth, i = heapq.heappop(heap)
        if values[i] > left or worth == 0:
            continue
        left -= values[i]
        bits[i] += 1
        if bits[i] < MOST_BITS:
            heapq.heappush(heap, (-gain(i), i))
    return bits


def _modules(model: nn.Module, piece: Step) -> list[nn.Module]:
    """The outermost modules of which all weights are selected."""
    if not piece.on:
        return [model]
    selected = {id(t.tensor) for t in chosen(model, piece, piece.key)[0]}
    weights = {id(t.tensor) for t in targets(model) if t.is_weight}

    def below(module: nn.Module) -> list[nn.Module]:
        own = {id(p) for p in module.parameters()} & weights
        if own and own <= selected:
            return [module]
        return [found for child in module.children() for found in below(child)]

    return list(dict.fromkeys(below(model)))
