"""Layers that share one weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from smelt.core.edit import Edit, Fill, Note, Tie
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.chains import Link, chains


@dataclass(frozen=True)
class Layers(Rewrite):
    """Tensors that are alike become one, their mean; training then tunes it in all of its places.

    Alike are tensors of one shape, of one kind of module, whose names differ in numbers only ('blocks.0.fc1.weight' and
    'blocks.7.fc1.weight'), or with `alike: shape` whatever their names.  They are split, in the order of the model,
    into `groups` runs of about equal length, each of which becomes one tensor.  Biases and norms are not tied unless
    `on` names them: on: ['*', '*.bias'].

    With `match` the units between a layer and the next (neurons, channels, where only functions and norms stand
    between) are first brought into the order in which the weights on both sides come closest to those of the first of
    their run; that alone does not change the outputs.

    applies to: every floating tensor that has its like; layers of equal shape
    needs a pretrained model: no; tied before training, it trains as such
    needs data: no
    needs training: yes: layers that were trained apart are not alike, and their mean does the work of none
    good at: deep models of equal blocks: the file holds one of them
    bad at: speed: every layer still runs; models with few layers of the same shape
    source: Lan et al. 2020, arXiv:1909.11942; match: Ainsworth et al. 2023, arXiv:2209.04836, section 3.2
    """

    alike: str = setting("name", "what decides who is alike, besides the shape", choices=("name", "shape"))
    groups: int = setting(1, "tensors that those that are alike become", low=1)
    match: bool = setting(False, "bring units into the order of the first before the mean is taken")

    def refuses(self, target: Target) -> str | None:
        if not target.tensor.is_floating_point():
            return f"it holds {target.tensor.dtype}, not floating values"
        if isinstance(target.module, nn.RNNBase):
            return "a recurrent layer keeps a list of its weights, in which ties are lost"
        return None if target.tensor.dim() else "it is a single number"

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        runs = self._runs(targets)
        tied = {t.name: run[0].name for run in runs for t in run}
        edits: list[Edit] = [Note(t.name, self._why(t)) for t in targets if t.name not in tied]
        values = _Values(model)
        if self.match:
            edits += values.match(runs)
        for run in runs:
            mean = torch.stack([values.of(t.name).double() for t in run]).mean(0)
            values.changed[run[0].name] = mean.to(run[0].tensor.dtype)
        edits += [Fill(name, value) for name, value in values.changed.items() if tied.get(name, name) == name]
        return edits + [Tie(run[0].name, t.name) for run in runs for t in run[1:]]

    def _runs(self, targets: Sequence[Target]) -> list[list[Target]]:
        """Those that become one tensor, two or more each."""
        found: dict[tuple[object, ...], list[Target]] = {}
        for t in targets:
            name = re.sub(r"\d+", "#", t.name) if self.alike == "name" else t.places[0][1]
            kind = type(t.module), t.tensor.shape, t.tensor.dtype, t.tensor.device, t.tensor.requires_grad
            found.setdefault((name, *kind), []).append(t)
        runs = []
        for members in found.values():
            ends = [round(i * len(members) / self.groups) for i in range(self.groups + 1)]
            runs += [members[a:b] for a, b in pairwise(ends) if b - a > 1]
        return runs

    def _why(self, target: Target) -> str:
        others = "a name that differs in numbers only" if self.alike == "name" else "the same kind of module"
        alone = f"no other selected tensor is {list(target.tensor.shape)} with {others}"
        return f"{alone}, or its group has one member" if self.groups > 1 else alone


class _Values:
    """The tensors of a model as they will be.  changed: those that are not as they were."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.changed: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(path), last).detach()
        return self.changed.get(name, found)

    def match(self, runs: Sequence[Sequence[Target]]) -> list[Edit]:
        """Units in the order of the first of their run; returns notes on those that have none."""
        links, reasons = chains(self.model)
        of = {link.producer: link for link in links}
        leader = {t.name: run[0].name for run in runs for t in run}
        notes: list[Edit] = []
        for run in runs:
            first = run[0].places[0][0]
            for t in run[1:]:
                path, name = t.places[0]
                if name == "weight" and path in of:
                    self._match(first, of.get(first), of[path], leader)
                elif name == "weight" and path in reasons:
                    notes.append(Note(t.name, f"its units keep their order: {reasons[path]}"))
        return notes

    def _match(self, first: str, onward: Link | None, link: Link, leader: dict[str, str]) -> None:
        """Permute the units of a link so that they are as near as can be to those of the layer `first`."""
        near, own = f"{first}.weight", f"{link.producer}.weight"
        pairs = [(self.of(near).flatten(1), self.of(own).flatten(1))]
        biases = [f"{path}.bias" for path in (first, link.producer)]
        if leader.get(biases[0], "") == leader.get(biases[1]):
            pairs.append((self.of(biases[0])[:, None], self.of(biases[1])[:, None]))
        units, after = len(self.of(own)), f"{link.consumer}.weight"
        if onward is not None and leader.get(f"{onward.consumer}.weight", "") == leader.get(after):
            pairs.append((self._columns(f"{onward.consumer}.weight", units), self._columns(after, units)))
        product = torch.stack([a.double() @ b.double().T for a, b in pairs]).sum(0)
        order = torch.from_numpy(linear_sum_assignment(product.cpu().numpy(), maximize=True)[1]).to(product.device)
        self._put(own, self.of(own)[order])
        columns = self.of(after).unflatten(1, (units, -1))[:, order]
        self._put(after, columns.flatten(1, 2))
        between = [(step.path, step.module) for step in link.between if step.module is not None]
        for path, module in [(link.producer, self.model.get_submodule(link.producer)), *between]:
            tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in tensors:
                full = f"{path}.{name}"
                if tensor.dim() and full != own:
                    self._put(full, self.of(full)[order])

    def _columns(self, name: str, units: int) -> Tensor:
        """[units, rest] of the weight of a consumer."""
        found: Tensor = self.of(name).unflatten(1, (units, -1)).transpose(0, 1).flatten(1)
        return found

    def _put(self, name: str, value: Tensor) -> None:
        self.changed[name] = value.contiguous()
