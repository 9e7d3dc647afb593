from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smelt.core.apply import seed_of
from smelt.core.edit import Edit, Note, Replace
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.core.target import targets as targets_of
from smelt.graph.carry import Carried, carried
from smelt.graph.fold import forward, plain
from smelt.graph.team import Team, turned
from smelt.graph.trace import twin
from smelt.graph.work import RefusedError, Trial, Work
from smelt.grids.hadamard import hadamard, rotation


@dataclass(frozen=True)
class Rotate(Rewrite):
    """Random rotations between layers; outputs stay, outliers are spread over all coordinates.

    stream  what all blocks read behind a norm and add to: everything that writes to it is multiplied by an orthogonal
            Q on its output side, everything that reads it on its input side.  Before that the gains (and biases) of
            the norms move into the layers that read them.  x / |x| commutes with Q; so does the subtraction of the
            mean (LayerNorm) where Q keeps the vector of ones: there it is mirrored once, so that it does.
    heads   pairs of layers with nothing between that mixes coordinates other than linearly: values and the output
            projection of an attention, one Q per head.

    Q is a Hadamard matrix with random signs where its size is known to have one (a power of two, or times 12, 20, 28,
    36 ...), else a random orthogonal matrix.  Streams are found by running the first batch.  An embedding that is tied
    to the head turns with it, unless a norm before the head has a gain to fold: with `untie` the head then gets
    weights of its own (a larger file), else the stream is left alone.

    applies to: transformers whose norms stand before the layers (pre-norm), with LayerNorm, RMSNorm or their like
    needs a pretrained model: yes
    needs data: a batch, to run the model
    needs training: no
    good at: 4-bit activations, weights of 3 bits and less with one scale per channel
    bad at: networks without norms before their layers, such as those with batch norm; weights that have groups anyway
    source: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot), arXiv:2401.15024 (gains); Liu et al. 2024,
        arXiv:2405.16406 (SpinQuant)
    """

    of: str = setting("all", "what is rotated", choices=("all", "stream", "heads"))
    kind: str = setting("hadamard", "rotations", choices=("hadamard", "orthogonal"))
    untie: bool = setting(False, "give a tied head weights of its own where the rotation needs it")
    tolerance: float = setting(1e-3, "largest change of an output, over the largest output", low=0)

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        example = known.example(model, "to find what it can rotate by running the model")
        wanted = {target.name for target in targets}
        scales = carried(model, example)
        first: list[Edit] = []
        if self.untie and self.of != "heads" and _stuck(model, scales):
            first = _untied(model)
            model = twin(model)
            for edit in first:
                edit.apply(model)
            wanted |= {target.name for target in targets_of(model) if target.name not in scales.reasons}
            scales = carried(model, example)
        stuck = _stuck(model, scales)
        turns = carried(model, example, "rotate", stuck)
        streams = [t for t in turns.teams if t.of("norm")]
        heads = [t for t in turns.teams if not t.of("norm")]
        chosen = [*(streams if self.of != "heads" else []), *(heads if self.of != "stream" else [])]
        trial = Trial(model, example, scales.norms, self.tolerance)
        changes = []
        for i, team in enumerate(t for t in chosen if t.size > 1 and t.names() & wanted):
            generator = torch.Generator().manual_seed(seed_of(known.seed, f"{team.name} {i}"))
            matrix = rotation(team.size, generator, self.kind)
            changes.append((f"{team.name} ({i})", partial(_turn, team=team, found=scales, matrix=matrix)))
        edits = trial.run(changes)
        notes: list[Edit] = [Note(name.rpartition(" (")[0], reason) for name, reason in trial.refused.items()]
        if self.of != "heads" and not streams:
            why = [f"{path}: {reason}" for path, reason in stuck.items()]
            notes.append(Note("", "no stream can be rotated" + (f"; {'; '.join(why[:3])}" if why else "")))
        sizes = {t.size for t in chosen if hadamard(t.size) is None} if self.kind == "hadamard" else set()
        notes += [Note("", f"no Hadamard matrix of size {n} is known here; took a random rotation") for n in sizes]
        return [*(first if edits else []), *edits, *notes]


def _stuck(model: nn.Module, scales: Carried) -> dict[str, str]:
    """Path of a norm -> why its gain and bias cannot move, so that no rotation passes it."""
    found = {}
    for norm in scales.norms.values():
        work = Work(model, scales.norms)
        if norm.kind != "batch" and not plain(work, norm):
            try:
                forward(work, scales, norm)
            except RefusedError as refusal:
                found[norm.path] = str(refusal)
    return found


def _untied(model: nn.Module) -> list[Edit]:
    """Linear layers that share the weights of an embedding get their own."""
    found: list[Edit] = []
    for target in targets_of(model):
        modules = {path: model.get_submodule(path) for path, _ in target.places}
        if any(isinstance(module, nn.Embedding) for module in modules.values()):
            for path, module in modules.items():
                if type(module) is nn.Linear:
                    values = {name: value.detach().clone() for name, value in module.state_dict().items()}
                    sizes = {"in_features": module.in_features, "out_features": module.out_features}
                    arguments = {**sizes, "bias": module.bias is not None}
                    found.append(Replace(path, "layer", {"kind": "Linear", "arguments": arguments}, values))
    return found


def _turn(work: Work, team: Team, found: Carried, matrix: Tensor) -> None:
    passed = [found.norms[place.tensor] for place in team.of("norm")]
    for norm in passed:
        if not plain(work, norm):
            forward(work, found, norm)
    if any(norm.kind == "layer" for norm in passed):
        if any(len(index) != team.size for index in team.of("norm").values()):
            raise RefusedError("a norm that subtracts the mean runs over more than what can be rotated")
        matrix = _keeping_the_mean(matrix)
    done = set()
    for place, index in team.places.items():
        if place.role != "norm" and (place.tensor, place.dim) not in done:
            done.add((place.tensor, place.dim))
            value = work.get(place.tensor)
            work.put(place.tensor, turned(value, place, index, matrix.to(value)))


def _keeping_the_mean(matrix: Tensor) -> Tensor:
    """An orthogonal matrix as near as one reflection, that maps the vector of ones to itself."""
    ones = torch.full_like(matrix[0], len(matrix) ** -0.5)
    mirror = matrix @ ones - ones
    if float(mirror.norm()) < 1e-9:
        return matrix
    mirror = mirror / mirror.norm()
    return matrix - 2 * torch.outer(mirror, mirror @ matrix)
