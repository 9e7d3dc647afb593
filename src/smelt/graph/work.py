"""New values for tensors around a team, tried on a copy of the model before anybody gets them as edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import evaluating, forward_or_raise, tensors
from smelt.core.edit import Edit, Fill, Replace, submodule
from smelt.core.errors import ModelError
from smelt.core.target import targets
from smelt.graph.norms import Norm
from smelt.graph.steps import hooked
from smelt.graph.team import Place, Team, each, scaled
from smelt.graph.trace import main, twin

# Layers that can be built anew with a bias: what they take besides.
_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_BUILT: dict[type[nn.Module], tuple[str, ...]] = {nn.Linear: ("in_features", "out_features")}
_BUILT |= dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION)
_BUILT |= dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*_CONVOLUTION, "output_padding"))
# Passes of the model that the search for what cannot be done may take.
BUDGET = 60


class RefusedError(Exception):
    """Something cannot be done; the message is the reason."""


class Work:
    """Values of a model on their way to be changed, in float64, and modules that others take the place of."""

    def __init__(self, model: nn.Module, norms: Mapping[str, Norm]):
        self.model, self.norms = model, norms
        self.targets = {t.name: t for t in targets(model)}
        self.values: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}  # path of a layer -> the bias that it did not have
        self.replaced: dict[str, Replace] = {}
        self._neutral = {norm.gain: norm.neutral for norm in norms.values()}

    def get(self, name: str) -> Tensor:
        """The value; of a norm's gain what it multiplies by."""
        if name not in self.values:
            self.values[name] = self.targets[name].tensor.detach().double()
        return self.values[name] + 1 - self._neutral.get(name, 1.0)

    def put(self, name: str, value: Tensor) -> None:
        self.values[name] = value - 1 + self._neutral.get(name, 1.0)

    def scale(self, team: Team, factor: Tensor, sides: Mapping[Place, Tensor] | None = None) -> None:
        """Multiply what makes each unit by its factor, and divide what reads it."""
        for place, index in (team.places if sides is None else sides).items():
            if place.role != "norm":
                own = each(place, index, factor.to(self.get(place.tensor)))
                self.put(place.tensor, scaled(self.get(place.tensor), place, own if place.role == "out" else 1 / own))

    def shift(self, weight: str, value: Tensor) -> None:
        """Add to the bias of the layer of a weight.  Raises RefusedError: it has none and cannot get one."""
        if not bool(value.any()):
            return
        target = self.targets[weight]
        (path, name), module = target.places[0], target.module
        bias = f"{path}.{name.replace('weight', 'bias')}" if path else name.replace("weight", "bias")
        if any(submodule(self.model, place) is not module for place, _ in target.places):
            raise RefusedError(f"{weight} is tied, and each of its layers would need a bias of its own")
        if bias in self.targets and bias != weight:
            self.put(bias, self.get(bias) + value)
        elif path in self.biases:
            self.biases[path] = self.biases[path] + value
        elif type(module) not in _BUILT or hooked(module) or name != "weight" or len(target.places) > 1:
            raise RefusedError(f"{path or 'the model'} has no bias, and cannot be built anew with one")
        else:
            self.biases[path] = value

    def edits(self) -> list[Edit]:
        found: list[Edit] = [*self.replaced.values()]
        for path, bias in self.biases.items():
            module = submodule(self.model, path)
            settings: dict[str, Any] = {name: getattr(module, name) for name in _BUILT[type(module)]}
            plain = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()} | {"bias": True}
            weight = self.get(f"{path}.weight")
            like = self.targets[f"{path}.weight"].tensor
            values = {"weight": weight.to(like), "bias": bias.to(like)}
            found.append(Replace(path, "layer", {"kind": type(module).__name__, "arguments": plain}, values))
        gone = tuple(f"{path}." for path in (*self.replaced, *self.biases))
        for name, value in self.values.items():
            old = self.targets[name].tensor.detach()
            if not name.startswith(gone) and not torch.equal(new := value.to(old), old):
                found.append(Fill(name, new))
        return found


Change = Callable[[Work], None]


class Trial:
    """Changes that are made together, tried, and where that fails, halved until the guilty ones are found.

    tolerance: largest difference of outputs on the example, over the largest output.
    refused: name of a change -> why it was not made.
    """

    def __init__(self, model: nn.Module, example: Any, norms: Mapping[str, Norm], tolerance: float):
        self.model, self.example, self.norms, self.tolerance = model, example, norms, tolerance
        self.edits: list[Edit] = []
        self.refused: dict[str, str] = {}
        self._accepted: list[tuple[str, Change]] = []
        self._left = BUDGET
        self._before = self._outputs(model)

    def run(self, changes: Sequence[tuple[str, Change]]) -> list[Edit]:
        """The edits of all changes that leave the outputs as they are."""
        able = []
        for name, change in changes:
            try:
                change(Work(self.model, self.norms))
                able.append((name, change))
            except RefusedError as refusal:
                self.refused[name] = str(refusal)
        self._search(able)
        return self.edits

    def _search(self, batch: list[tuple[str, Change]]) -> None:
        if not batch:
            return
        reason = self._attempt([*self._accepted, *batch])
        if reason is None:
            self._accepted += batch
        elif len(batch) == 1 or self._left <= 0:
            self.refused |= dict.fromkeys((name for name, _ in batch), reason)
        else:
            half = len(batch) // 2
            self._search(batch[:half])
            self._search(batch[half:])

    def _attempt(self, batch: Sequence[tuple[str, Change]]) -> str | None:
        """Why these cannot be made together, or None; then their edits are kept."""
        self._left -= 1
        work = Work(self.model, self.norms)
        try:
            for _, change in batch:
                change(work)
            edits = work.edits()
            copied = twin(self.model)
            for edit in edits:
                edit.apply(copied)
            after = self._outputs(copied)
        except (RefusedError, ModelError) as error:
            return str(error)
        if (moved := difference(self._before, after)) > self.tolerance:
            return f"the outputs would change by {moved:.0e} of the largest, more than {self.tolerance:.0e}"
        self.edits = edits
        return None

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model):
            out = forward_or_raise(model, self.example, "on the example")
        return [t.detach() for t in tensors(main(out)) if t.is_floating_point()]


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest difference over the largest value; infinite for other shapes or NaN."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return torch.inf
    top = max((float(t.double().abs().max()) for t in before if t.numel()), default=0.0)
    worst = max((float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)
    return worst / top if top and worst == worst else (torch.inf if worst else 0.0)


def layers(team: Team, work: Work, role: str) -> list[Place]:
    """Sides of weights, of two or more dimensions."""
    return [p for p in team.of(role) if work.targets[p.tensor].tensor.dim() > 1]
