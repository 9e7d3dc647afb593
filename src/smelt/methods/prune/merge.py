from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smelt.core.edit import Edit, Fill, Keep, Note, Set, submodule
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.chains import Link, chains

# 1 - cosine below which rows of float32 weights are the same up to rounding.
EXACT = 1e-12
# Rows of the table of cosines that are in memory at a time.
BLOCK = 1024


@dataclass(frozen=True)
class Merge(Rewrite):
    """Linear neurons that do the same become one, dead ones go; outputs stay the same.

    Looked at are pairs of linear layers with only elementwise functions f between them, where neuron i gives
    f(w_i x + b_i) to column u_i of the next weight.  Until nothing changes any more:

        dead        u_i = 0, or w_i = 0: it gives the constant f(b_i), which moves into the next bias
        the same    (w_j, b_j) = (w_i, b_i), or c times it with c > 0 where f is positively homogeneous (ReLU, leaky
                    ReLU): j goes, u_i becomes u_i + c u_j

    With `tolerance`, rows count as the same whose cosine (with equal lengths, unless scaled ones count) is at least
    1 - tolerance.  With `ratio`, neurons go on being merged, cheapest first, into their nearest neighbour i with the
    scale c >= 0 that fits best (Kim et al. take the ratio of lengths; c = 1 where f is not homogeneous), where the cost
    is |(w_j, b_j) - c (w_i, b_i)|^2 |u_j|^2.

    applies to: linear layers whose output goes through elementwise functions into one other linear layer
    needs a pretrained model: yes
    needs data: no
    needs training: no; with a ratio, a little, to recover
    good at: what training has left unused: exact, smaller and faster on everything
    bad at: networks without twins or dead units, which it leaves as they are
    source: Srinivas & Babu 2015, arXiv:1507.06149 (cost); Kim et al. 2020, arXiv:2010.13160 (scaled neighbour)
    """

    tolerance: float = setting(0.0, "largest 1 - cosine of neurons that count as the same", low=0, high=1)
    ratio: float = setting(0.0, "share of the neurons of each layer to take out at least", low=0, high=0.99)

    def refuses(self, target: Target) -> str | None:
        if type(target.module) is not nn.Linear or target.places[0][1] != "weight":
            return f"it is no weight of a linear layer but of {type(target.module).__name__}"
        return None

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        wanted = {target.places[0][0]: target.name for target in targets}
        links, reasons = chains(model)
        edits: list[Edit] = [Note(wanted[path], reason) for path, reason in reasons.items() if path in wanted]
        links = [link for link in links if link.producer in wanted]
        layers = {path: _Layer(model, path) for link in links for path in (link.producer, link.consumer)}
        while any([self._same(layers, link) for link in links]):
            pass
        if self.ratio:
            for link in links:
                self._closest(layers[link.producer], layers[link.consumer], link)
            while any([self._same(layers, link) for link in links]):
                pass
        for link in links:
            stuck = _constant(layers[link.producer])
            if len(layers[link.producer].rows) > 1 and bool(stuck.any()):
                why = f"{int(stuck.sum())} of its neurons give constants, and {link.consumer} has no bias to take them"
                edits.append(Note(wanted[link.producer], why))
        for path, layer in layers.items():
            edits += layer.edits(path)
        return edits

    def _same(self, layers: Mapping[str, _Layer], link: Link) -> bool:
        """Take out what is dead or the same at one link; whether there was any."""
        first, second = layers[link.producer], layers[link.consumer]
        before = len(first.rows)
        keep = second.weight.any(0)
        flat = keep & _constant(first)
        if bool(flat.any()):
            gives = link.apply(first.constants(flat)).double()
            if second.bias is not None:
                second.bias += second.weight[:, flat] @ gives
                keep &= ~flat
            else:
                keep[flat.nonzero()[gives == 0]] = False
        _keep(first, second, keep)
        rows = first.augmented()
        leader = _leaders(rows, max(self.tolerance, EXACT), link.homogeneous)
        scale = _scales(rows, leader) if link.homogeneous else torch.ones_like(rows[:, 0])
        followers = leader != torch.arange(len(leader), device=leader.device)
        if bool(followers.any()):
            moved = second.weight[:, followers] * scale[followers]
            second.weight.index_add_(1, leader[followers], moved)
            second.filled = True
            _keep(first, second, ~followers)
        return len(first.rows) < before

    def _closest(self, first: _Layer, second: _Layer, link: Link) -> None:
        """Merge the cheapest pairs until the layer has lost its share."""
        surplus = len(first.rows) - (first.width - int(self.ratio * first.width))
        if surplus <= 0:
            return
        rows = first.augmented()
        length = rows.square().sum(1)
        dot = rows @ rows.T
        if link.homogeneous:
            dot.clamp_min_(0)
            apart = length[:, None] - dot.square() / length.clamp_min(torch.finfo(dot.dtype).tiny)
        else:
            apart = length[:, None] - 2 * dot + length
        apart = apart.clamp_min_(0).fill_diagonal_(torch.inf)  # [j, i]: what merging j into i changes j by, squared
        best, nearest = apart.min(1)
        weight = second.weight.square().sum(0)
        keep = torch.ones_like(weight, dtype=torch.bool)
        for _ in range(surplus):
            j = int((best * weight).where(keep, torch.inf).argmin())
            i = int(nearest[j])
            scale = dot[j, i] / length[i] if link.homogeneous and length[i] > 0 else float(not link.homogeneous)
            second.weight[:, i] += scale * second.weight[:, j]
            weight[i] = second.weight[:, i].square().sum()
            keep[j] = False
            apart[:, j] = torch.inf
            orphans = (nearest == j).nonzero()[:, 0]
            best[orphans], nearest[orphans] = apart[orphans].min(1)
        second.filled = True
        _keep(first, second, keep)


class _Layer:
    """A linear layer on its way: values in float64, and which rows and columns of the original are left."""

    def __init__(self, model: nn.Module, path: str):
        module = submodule(model, path)
        assert isinstance(module, nn.Linear)
        self.weight = module.weight.detach().to(torch.float64, copy=True)
        self.bias = None if module.bias is None else module.bias.detach().to(torch.float64, copy=True)
        self.dtype, self.width = module.weight.dtype, module.out_features
        self.rows = torch.arange(module.out_features)
        self.columns = torch.arange(module.in_features)
        self.original = module
        self.filled = False

    def augmented(self) -> Tensor:
        """[out, in + 1]: the bias as one more column."""
        bias = torch.zeros_like(self.weight[:, 0]) if self.bias is None else self.bias
        return torch.cat([self.weight, bias[:, None]], 1)

    def constants(self, which: Tensor) -> Tensor:
        """What neurons without incoming weights give before the functions, in the dtype of the layer."""
        return (torch.zeros_like(self.weight[:, 0]) if self.bias is None else self.bias)[which].to(self.dtype)

    def edits(self, path: str) -> list[Edit]:
        found: list[Edit] = []
        module = self.original
        if len(self.rows) < module.out_features:
            index = tuple(self.rows.tolist())
            found += [Keep(f"{path}.weight", 0, index), Set(path, "out_features", len(index))]
            if self.bias is not None:
                found.append(Keep(f"{path}.bias", 0, index))
        if len(self.columns) < module.in_features:
            index = tuple(self.columns.tolist())
            found += [Keep(f"{path}.weight", 1, index), Set(path, "in_features", len(index))]
        if self.filled:
            found.append(Fill(f"{path}.weight", self.weight.to(self.dtype)))
        if self.bias is not None and not torch.equal(self.bias, module.bias[self.rows.to(module.bias.device)].double()):
            found.append(Fill(f"{path}.bias", self.bias.to(self.dtype)))
        return found


def _constant(layer: _Layer) -> Tensor:
    return ~layer.weight.any(1)


def _keep(first: _Layer, second: _Layer, keep: Tensor) -> None:
    """Let only these neurons stand between two layers; if none is left, one that is not listened to."""
    if not bool(keep.any()):
        keep = keep.clone()
        keep[0] = second.filled = True
        second.weight[:, 0] = 0
    first.weight, second.weight = first.weight[keep], second.weight[:, keep]
    if first.bias is not None:
        first.bias = first.bias[keep]
    first.rows, second.columns = first.rows[keep.cpu()], second.columns[keep.cpu()]


def _leaders(rows: Tensor, tolerance: float, scaled: bool) -> Tensor:
    """[n]: for each row the first row that it is the same as (itself, if none).

    Rows follow a leader, never another follower, so what is merged is within the tolerance of what stays.
    """
    n = len(rows)
    length = rows.norm(dim=1)
    unit = rows / length.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
    free = torch.arange(n, device=rows.device)
    leader = free.clone()
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        if scaled:
            near = unit[block] @ unit.T >= 1 - tolerance
        else:
            both = length[block, None] * length
            near = length[block, None].square() + length.square() - 2 * (rows[block] @ rows.T) <= 2 * tolerance * both
        near &= free > free[block, None]
        for i in near.any(1).nonzero()[:, 0].tolist():
            if leader[start + i] == start + i:
                leader[near[i] & (leader == free)] = start + i
    return leader


def _scales(rows: Tensor, leader: Tensor) -> Tensor:
    """[n]: the c that makes c * (the row of the leader) nearest to each row; 1 for leaders."""
    own = rows[leader]
    return (rows * own).sum(1) / own.square().sum(1).clamp_min(torch.finfo(rows.dtype).tiny)
