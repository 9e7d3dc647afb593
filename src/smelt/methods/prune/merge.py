from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smelt.core.edit import Edit, Note
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.chains import GROUPED, LAYERS, Link, chains
from smelt.graph.flow import Assumed, Measured, Moments, Source, moments
from smelt.graph.layers import TINY, Layer, constants, edits_between, keep, leaders, same_rows, stages
from smelt.scores._columns import eliminate, nearest, refit

# 1 - cosine below which rows of float32 values are the same up to rounding.
EXACT = 1e-12
# What is added to the diagonal of a Gram matrix, over its mean.
RIDGE = 1e-2
# Columns of a consumer up to which each is refitted by itself; of larger ones, units are mixed as a whole.
WHOLE = 2048


@dataclass(frozen=True)
class Merge(Rewrite):
    """Neurons and channels that do the same become one, dead ones go; with a ratio, the rest takes over what goes.

    Looked at are pairs of layers (linear, convolution) between which units, that is neurons or channels, keep apart:
    functions, batch norm, pooling, depthwise convolutions, flattening.  Unit i of the first meets the columns U_i of
    the second.  What never changes the outputs is done first, until nothing changes any more:

        dead        U_i = 0, or it gives a constant: that moves into the next bias (not where the next layer has none,
                    or lays its kernel over zeros at the borders; 0 goes anyhow)
        the same    weights and bias, norm included, are equal, or c > 0 times so where f is positively homogeneous
                    (ReLU, leaky ReLU, pooling): j goes, U_i becomes U_i + c U_j

    `by: activations` then does the same with what the units give on the job's data (at most 16 batches of the training
    split, labels unused), so that outputs stay on those data.  With `tolerance`, units count as the same whose rows, or
    activations, have a cosine (with equal lengths, unless scaled ones count) of at least 1 - tolerance.

    With `ratio`, layer after layer loses units, judged by the Gram matrix G of the activations: on data (`by:
    activations`), or on what standard normal inputs and the statistics of batch norms let expect (`by: weights`).

        refit ridge   those go whose loss the others can best make up for in the input of the next layer, whose weights
                      and bias are fitted anew: min |A U^T - A' V^T|^2 + ridge |V - U|^2, A of the original model, A'
                      of the one changed so far; taken out one by one by the rule of the optimal brain surgeon
        refit sum     the cheapest pairs, j into its nearest neighbour: c = G_ij / G_ii, cost |a_j - c a_i|^2 |U_j|^2

    applies to: linear layers and convolutions whose units keep apart up to one other linear layer or convolution
    needs a pretrained model: yes
    needs data: no; by activations, some without labels
    needs training: no; with a high ratio, a little, to recover
    good at: what training has left unused: exact; half of the units of a wide layer at little loss
    bad at: networks without twins or dead units, which it leaves as they are without a ratio; layers around additions
    source: Kim et al. 2020, arXiv:2010.13160; He et al. 2017, arXiv:1707.06168 (refit); Hassibi & Stork 1993 (order)
    """

    tolerance: float = setting(0.0, "largest 1 - cosine of units that count as the same", low=0, high=1)
    ratio: float = setting(0.0, "share of the units of each layer to take out at least", low=0, high=0.99)
    by: str = setting("weights", "what units are compared by", choices=("weights", "activations"))
    refit: str = setting("ridge", "who takes over what goes: all others, or the nearest", choices=("ridge", "sum"))

    def refuses(self, target: Target) -> str | None:
        if type(target.module) not in LAYERS or target.places[0][1] != "weight":
            return f"it is no weight of a linear layer or convolution but of {type(target.module).__name__}"
        return GROUPED if getattr(target.module, "groups", 1) > 1 else None

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        wanted = {target.places[0][0]: target.name for target in targets}
        every, reasons = chains(model)
        edits: list[Edit] = [Note(wanted[path], reason) for path, reason in reasons.items() if path in wanted]
        links = [link for link in every if link.producer in wanted]
        width = {link.consumer: len(model.get_parameter(f"{link.producer}.weight")) for link in links}
        paths = dict.fromkeys(path for link in links for path in (link.producer, link.consumer))
        layers = {path: Layer(model, path, width.get(path)) for path in paths}
        self._settle(layers, links)
        if links and (self.ratio or self.by == "activations"):
            source: Source = Assumed(model, every, known.seed)
            if self.by == "activations":
                known.example(model, "to compare activations (by: activations)")
                source = Measured(model, known.batches or ())
            for link in links:
                if isinstance(source, Assumed) and source.side(link) is None:
                    why = f"no square image fits all layers up to {link.consumer}, so nothing can be assumed of them"
                    edits.append(Note(wanted[link.producer], f"{why}; by: activations needs no such assumption"))
                else:
                    self._reduce(layers, link, source)
            self._settle(layers, links)
        for link in links:
            edits += [Note(wanted[link.producer], why) for why in _stuck(layers, link)]
            edits += edits_between(layers[link.producer], link)
        for layer in layers.values():
            edits += layer.edits()
        return edits

    def _settle(self, layers: Mapping[str, Layer], links: Sequence[Link]) -> None:
        while any([self._same(layers[link.producer], layers[link.consumer], link) for link in links]):
            pass

    def _same(self, first: Layer, second: Layer, link: Link) -> bool:
        """Take out what is dead or the same at one link; whether there was any."""
        before = len(first.rows)
        kept = second.weight.transpose(1, 2).flatten(0, 1).any(0)
        flat, gives = constants(first, link)
        _fold(second, kept, flat, gives, link)
        keep(first, second, kept)
        rows, length = stages(first, link)
        leader = leaders(same_rows(rows, max(self.tolerance, EXACT)), len(length)).to(length.device)
        _follow(first, second, leader, length / length[leader].clamp_min(TINY))
        return len(first.rows) < before

    def _reduce(self, layers: Mapping[str, Layer], link: Link, source: Source) -> None:
        """Take out at one link what activations show to be dead or the same, then what the ratio asks for."""
        first, second = layers[link.producer], layers[link.consumer]
        changed = {name: value for layer in layers.values() for name, value in layer.full().items()}
        if self.by == "activations":
            self._same_on_data(first, second, link, moments(source, link, second, changed, whole=False, constant=True))
        count = len(first.rows) - (first.width - int(self.ratio * first.width))
        if count <= 0:
            return
        if self.refit == "sum":
            gram = moments(source, link, second, changed, whole=False, constant=False).gram
            stays, outgoing = nearest(gram, _outgoing(second.weight, False), count)
            second.weight, second.filled = _incoming(outgoing, second, False), True
            keep(first, second, stays)
        else:
            whole = second.units * second.weight.shape[2] <= WHOLE
            with_bias = second.bias is not None
            seen = moments(source, link, second, changed, whole=whole, constant=with_bias)
            _ridge(first, second, seen, count, whole)

    def _same_on_data(self, first: Layer, second: Layer, link: Link, seen: Moments) -> None:
        gram, tolerance = seen.gram[:-1, :-1], max(self.tolerance, EXACT)
        length, mean = gram.diagonal().sqrt(), seen.gram[:-1, -1]
        kept = torch.ones_like(length, dtype=torch.bool)
        _fold(second, kept, mean.abs() >= (1 - tolerance) * length, mean, link)
        keep(first, second, kept)
        gram, length = gram[kept][:, kept], length[kept]
        if bool(kept.any()):
            cosine = gram / (length[:, None] * length).clamp_min(TINY)
            leader = leaders(lambda block: cosine[block] >= 1 - tolerance, len(length)).to(gram.device)
            own = torch.arange(len(length), device=gram.device)
            _follow(first, second, leader, gram[own, leader] / gram[leader, leader].clamp_min(TINY))


def _fold(second: Layer, kept: Tensor, flat: Tensor, gives: Tensor, link: Link) -> None:
    """Move constants into the bias of the consumer, where that is the same; `kept` loses the units."""
    movable = kept & flat & ((gives == 0) | (second.bias is not None and not link.pads))
    if second.bias is not None:
        second.bias += second.weight[:, movable].sum(2) @ gives[movable]
    kept &= ~movable


def _follow(first: Layer, second: Layer, leader: Tensor, scale: Tensor) -> None:
    """Let each unit be done by its leader, times a scale."""
    followers = leader != torch.arange(len(leader), device=leader.device)
    if bool(followers.any()):
        moved = second.weight[:, followers] * scale[followers, None]
        second.weight.index_add_(1, leader[followers], moved)
        second.filled = True
        keep(first, second, ~followers)


def _ridge(first: Layer, second: Layer, seen: Moments, count: int, whole: bool) -> None:
    """Take out `count` units; the columns of the others, and the bias, are fitted to what the original layer gave."""
    original, now = _outgoing(second.original, whole), _outgoing(second.weight, whole)
    columns = now.shape[1]
    mean = float(seen.gram.diagonal()[:columns].mean())
    ridge = seen.gram.new_zeros(len(seen.gram))
    ridge[:columns] = RIDGE * mean or 1.0
    if second.bias is not None:  # the column of ones
        bias = second.module.bias.detach().double()[second.rows.to(second.weight.device)]  # type: ignore[union-attr]
        share = bias.repeat_interleave(len(now) // len(bias)) * len(bias) / len(now)
        original = torch.cat([original, share[:, None]], 1)
        now = torch.cat([now, torch.zeros_like(share)[:, None]], 1)
    gram, products = seen.gram + ridge.diag(), original @ seen.cross + now * ridge
    best = torch.linalg.solve(gram, products.T).T
    stays = eliminate(gram, best, len(second.columns), seen.size, count)
    kept = torch.ones_like(ridge, dtype=torch.bool)
    kept[:columns] = stays.repeat_interleave(seen.size)
    outgoing = refit(gram, products, kept)
    keep(first, second, stays)
    if second.bias is not None:
        second.bias = outgoing[:, -1].reshape(len(second.bias), -1).sum(1)
        outgoing = outgoing[:, :-1]
    second.weight, second.filled = _incoming(outgoing, second, whole), True


def _outgoing(weight: Tensor, whole: bool) -> Tensor:
    """[out, units, k] -> [out, units * k], or [out * k, units]."""
    return weight.flatten(1) if whole else weight.transpose(1, 2).flatten(0, 1)


def _incoming(outgoing: Tensor, second: Layer, whole: bool) -> Tensor:
    """The inverse of `_outgoing`."""
    out, _, k = second.weight.shape
    return outgoing.reshape(out, -1, k) if whole else outgoing.reshape(out, k, -1).transpose(1, 2).contiguous()


def _stuck(layers: Mapping[str, Layer], link: Link) -> list[str]:
    """Why constants stay."""
    first, second = layers[link.producer], layers[link.consumer]
    number = int(constants(first, link)[0].sum())
    if not number or len(first.rows) == 1:
        return []
    why = "has no bias to take them" if second.bias is None else "adds zeros around them, so that they are none there"
    return [f"{number} of its units give constants, and {link.consumer} {why}"]
