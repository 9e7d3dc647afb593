"""One piece of a training context with the tensors it acts on: when its states are fitted anew, and to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.apply import seed_of
from smelt.core.errors import ModelError
from smelt.core.method import Codec, Inside, Lossless, Stats
from smelt.core.settings import ramps, resolve
from smelt.core.store import pack, rest_bytes
from smelt.train.slot import Link, Slot

# Share of the loop after which a codec that settles (a mask) no longer moves, unless its ramp says otherwise.
SETTLED = 0.75


@dataclass
class Group:
    """Their plan is made together."""

    codec: Codec
    slots: list[Slot]
    links: list[Link]
    statistics: dict[str, dict[str, Any]]

    def moves(self, done: int, steps: int | None, every: int, *, epoch: bool, last: bool) -> bool:
        """Whether it is fitted anew after `done` of `steps`: what ramps, and each epoch what does not settle.

        every: updates between two times, unless the codec has a period of its own.
        """
        own = self.codec.period()
        every = own or every
        if not (last or (not own if epoch else every and done % every == 0)):
            return False
        moving = ramps(self.codec).values()
        if not self.codec.settles:
            return bool(moving) or epoch or last
        finish = max((r.finish for r in moving), default=SETTLED)
        window = (every + 1) / steps if steps else 0.0  # one last fit where the ramp arrives
        return (min(1.0, done / steps) if steps else 0.0) <= finish + window and not last

    def fit(self, t: float, done: int, seed: int, tail: Sequence[Lossless]) -> list[tuple[nn.Parameter, Tensor]]:
        """Fit the states at `t` of the loop; (leaf, where) of entries that start anew from 0.

        Raises:
            ModelError: a tensor that is not finite.
        """
        pairs = list(zip(self.slots, self.links, strict=True))
        seen = {slot.target.name: slot.seen_by(link) for slot, link in pairs}
        for name, values in seen.items():
            if not bool(torch.isfinite(values.x).all()):
                raise ModelError(f"{name} became NaN or infinite in training, after {done} steps")
        scout = {s.target.name: {**self.statistics[s.target.name], **link.seen} for s, link in pairs}
        plan = resolve(self.codec, t).plan(seen, scout, lambda e: rest_bytes(pack(e, tail)))
        anew = []
        for slot, link in pairs:
            name, before = slot.target.name, link.state
            if before is not None and any(True for _ in before.parameters()) and not self.codec.renews:
                continue  # it learns its state
            link.codec = plan[name]
            inside = Inside(t, before, dict(link.seen))
            stats = Stats(seen[name].where, self.statistics[name], seed_of(seed, name), inside)
            link.state = link.codec.fit(seen[name].x, stats)
            if (fresh := link.codec.restarts(before, link.state)) is not None:
                anew.append((slot.leaves[slot.carrier or ""], fresh))
        return anew
