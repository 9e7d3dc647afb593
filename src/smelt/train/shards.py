"""A module whose parameters, gradients and moments lie in shares over the processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smelt.train.slot import flatten


class Shards:
    """One group of parameters: all of them are gathered for a forward pass and given back after the backward pass,
    when each process keeps its share of the mean gradients.

    Numbers alone and what is not float32 stay whole in every process, and so do buffers.

    Args:
        step: the module; its modules hold their own parameters again after `leave`.
        mesh: of all processes, in one dimension.
    """

    def __init__(self, step: nn.Module, mesh: Any):
        from torch.distributed.fsdp import fully_shard

        self.whole_ones = {p for p in step.parameters() if not p.dim() or p.dtype != torch.float32}
        held = [(m, n, p) for m in step.modules() for n, p in m._parameters.items() if p is not None]
        self._places = [(m, n, p) for m, n, p in held if p not in self.whole_ones]
        self._depth = 0
        self._shares: dict[int, Any] = {}  # while it is whole: by the id of a parameter
        self.step: Any = fully_shard(step, mesh=mesh, ignored_params=self.whole_ones)
        for _, _, p in self._places:
            p.data = p.data.new_empty(0)

    def hold(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer of the parameters as they were have the shares, in groups without other tensors."""
        shares: dict[nn.Parameter, Any] = {p: m._parameters[n] for m, n, p in self._places}
        groups = []
        for group in optimizer.param_groups:
            own = [shares[p] for p in group["params"] if p in shares]
            rest = [p for p in group["params"] if p not in shares]
            groups += [{**group, "params": part} for part in (own, rest) if part]
        optimizer.param_groups[:] = groups
        for p, share in shares.items():
            if (held := optimizer.state.pop(p, None)) is not None:
                optimizer.state[share] = {
                    name: _like(value, share) if isinstance(value, Tensor) and value.shape == share.shape else value
                    for name, value in held.items()
                }

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Meanwhile the modules hold all parameters whole; what is written to them lasts."""
        self._depth += 1
        try:
            if self._depth == 1:
                shares = [m._parameters[n] for m, n, _ in self._places]
                self.step.unshard()
                now = [m._parameters[n] for m, n, _ in self._places]
                self._shares = {id(p): share for p, share in zip(now, shares, strict=True)}
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                with torch.no_grad():
                    for m, n, _ in self._places:
                        share: Any = self._shares[id(m._parameters[n])]
                        share.copy_(_like(m._parameters[n], share))  # type: ignore[arg-type]
                self._shares = {}
                self.step.reshard()

    def share(self, leaf: nn.Parameter) -> Any:
        """Of a parameter, while it is whole."""
        return self._shares.get(id(leaf))

    def leave(self, lost: bool) -> None:
        """Give the modules back what they held, with the values of now; with NaN, without asking others, if `lost`."""
        found = [m._parameters[n] for m, n, _ in self._places]
        if lost:
            values = [torch.full(p.shape, torch.nan, device=p.device) for p in found if p is not None]
        else:
            with self.whole():
                values = [m._parameters[n].detach().clone() for m, n, _ in self._places]  # type: ignore[union-attr]
        for (m, n, p), value in zip(self._places, values, strict=True):
            p.data = value
            m._parameters[n] = p
            flatten(m, n, p)
        for m in self.step.modules():
            for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
                m.__dict__.pop(name, None)


def gathered(x: Any) -> Any:
    """The whole of a share, from all processes; what is none as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x: Any) -> Tensor:
    """The entries of a share that lie in this process."""
    found: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return found


def moments(optimizer: torch.optim.Optimizer, leaves: list[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
    """What an optimizer remembers, by the number of the parameter, gathered."""
    held = {i: optimizer.state[leaf] for i, leaf in enumerate(leaves) if leaf in optimizer.state}
    return {i: {name: torch.as_tensor(gathered(v)) for name, v in found.items()} for i, found in held.items()}


@torch.no_grad()
def restart(optimizer: torch.optim.Optimizer | None, leaf: nn.Parameter, where: Tensor, share: Any = None) -> None:
    """Set entries to 0, and what the optimizer remembers of them; of a leaf, or of its share."""
    leaf[where] = 0
    held = leaf if share is None else share
    here = where if share is None else _like(where, share)
    for value in optimizer.state.get(held, {}).values() if optimizer is not None else ():
        if isinstance(value, Tensor) and value.shape == leaf.shape:
            value.masked_fill_(here, 0)


def _like(x: Tensor, share: Any) -> Any:
    """This process's share of a tensor that all have."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.detach().to(share.device), share.device_mesh, share.placements, src_data_rank=None)
