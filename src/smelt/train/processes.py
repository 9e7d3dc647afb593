"""The processes that run one loop together, each on its share of every batch, through Hugging Face accelerate.

A launcher (`accelerate launch`, `torchrun`) starts them, all with the same program; without one there is one process.
Each iterates over all batches and takes its share of the samples of each, so that a batch is as large as in one
process, and gradients are means over the whole of it.  What looks at a batch as a whole (batch norms, relational
distillation) sees the share.  Random numbers are drawn alike in all processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import samples
from smelt.core.errors import ModelError
from smelt.train.shards import Shards, local, restart


class Processes:
    """Args:
        device: 'cpu' or 'cuda:1', of this process; None for one process whatever a launcher started.

    Raises:
        ModelError: a launcher started several processes, and accelerate is not installed, or is set to what is not
            served here.
    """

    def __init__(self, device: str | None):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self._accelerator: Any = None
        self.sharded = False
        self.shards: Shards | None = None  # between `wrap` and `leave`
        if self.count == 1 or device is None:
            self.count, self.rank = 1, 0
            return
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
        except ImportError:
            raise ModelError(
                f"this is process {self.rank} of {self.count}, which need accelerate: pip install 'smelt[accelerate]'"
            ) from None
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        # The precision of the forward passes is the recipe's.
        self._accelerator = Accelerator(cpu=device.startswith("cpu"), mixed_precision="no", kwargs_handlers=[unused])
        kind = str(self._accelerator.distributed_type)
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # on CPUs its `kind` is another
        if self.sharded:
            if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
                raise ModelError(f"FSDP needs torch 2.7 or later; this is {torch.__version__}")
            from torch.distributed.fsdp import CPUOffloadPolicy

            plugin = FullyShardedDataParallelPlugin()
            if plugin.fsdp_version != 2:
                raise ModelError(f"accelerate is set to FSDP {plugin.fsdp_version}; give --fsdp_version 2")
            if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
                raise ModelError("accelerate is set to offload parameters; give --fsdp_offload_params false")
        elif "MULTI" not in kind:
            raise ModelError(f"accelerate is set to {kind}; several processes train with DDP or FSDP 2")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wrap(self, step: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """A module whose gradients are means over the processes; they start from what the first one has.

        With shares the parameters of `step` are others until `leave`, and the optimizer has these.
        """
        if self._accelerator is None:
            return step
        if not self.sharded:
            return self._accelerator.prepare_model(step)  # type: ignore[no-any-return]
        from torch.distributed.device_mesh import init_device_mesh

        self.agreed({str(i): x.detach() for i, x in enumerate((*step.parameters(), *step.buffers()))})
        self.shards = Shards(step, init_device_mesh(self._accelerator.device.type, (self.count,)))
        self.shards.hold(optimizer)
        return self.shards.step  # type: ignore[no-any-return]

    def leave(self, lost: bool) -> None:
        """Undo `wrap`; see `Shards.leave`."""
        if self.shards is not None:
            self.shards.leave(lost)
            self.shards = None

    def whole(self, yes: bool = True) -> AbstractContextManager[Any]:
        """Meanwhile every process has all of every parameter, if `yes`."""
        return self.shards.whole() if yes and self.shards is not None else nullcontext()

    def alone(self, step: nn.Module, yes: bool) -> AbstractContextManager[Any]:
        """Meanwhile gradients may stay with each process, if `yes`."""
        copies = self._accelerator is not None and not self.sharded
        return step.no_sync() if yes and copies else nullcontext()  # type: ignore[operator,no-any-return]

    def restart(self, optimizer: torch.optim.Optimizer | None, leaf: nn.Parameter, where: Tensor) -> None:
        """Set entries to 0, and what the optimizer remembers of them; while it is whole."""
        restart(optimizer, leaf, where, self.shards.share(leaf) if self.shards is not None else None)

    def ready(self, learning: Sequence[nn.Parameter], clip: float | None) -> None:
        """Make gradients that the optimizer can use: means, of a norm of at most `clip`."""
        if self.shards is None:
            if clip is not None:
                nn.utils.clip_grad_norm_(learning, clip)
            return
        shares: Any = 0.0
        rest: Any = 0.0
        for p in learning:
            if p.grad is not None and p in self.shards.whole_ones:
                p.grad = self.mean(p.grad)
                rest = rest + p.grad.float().square().sum()
            elif p.grad is not None:
                shares = shares + local(p.grad).float().square().sum()
        if clip is not None:
            norm = torch.sqrt(self.count * self.mean(torch.as_tensor(shares)) + rest)
            for p in learning:
                if p.grad is not None:
                    local(p.grad).mul_(torch.clamp(clip / (norm + 1e-6), max=1.0))

    def share(self, tree: Any, inputs: Any) -> tuple[Any, float]:
        """(this process's share of the samples of a batch, by how much its mean counts in a mean over the processes).

        `inputs` tells how many samples there are.  Who gets none takes the first one, which does not count.
        """
        if self._accelerator is None:
            return tree, 1.0
        n = samples(inputs)
        begin, end = n * self.rank // self.count, n * (self.rank + 1) // self.count
        counts = (end - begin) * self.count / n
        return _rows(tree, slice(begin, end) if end > begin else slice(0, 1), n), counts

    def mean(self, x: Tensor) -> Tensor:
        return x if self._accelerator is None else self._accelerator.reduce(x, "mean")  # type: ignore[no-any-return]

    def agreed(self, value: Any) -> Any:
        """What the first process has: a number, or tensors in a mapping."""
        if self._accelerator is None:
            return value
        from accelerate.utils import broadcast

        if not isinstance(value, Mapping):
            told = torch.tensor([value], dtype=torch.float64, device=self._accelerator.device)
            return float(broadcast(told)[0])
        return broadcast(dict(value))

    def rows(self, x: Tensor) -> Tensor:
        """[processes, ...]: the tensor of each."""
        if self._accelerator is None:
            return x[None]
        found: Tensor = self._accelerator.gather(x[None].to(self._accelerator.device))
        return found.cpu()

    def meet(self) -> None:
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def _rows(tree: Any, rows: slice, n: int) -> Any:
    """Of every tensor with `n` rows those; the rest as it is."""
    if isinstance(tree, Tensor):
        return tree[rows] if tree.dim() and len(tree) == n else tree
    if isinstance(tree, Mapping):
        return {k: _rows(v, rows, n) for k, v in tree.items()}
    return tuple(_rows(v, rows, n) for v in tree) if isinstance(tree, (tuple, list)) else tree
