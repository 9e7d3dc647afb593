"""The processes that run one loop together, each on its share of every batch, through Hugging Face accelerate.

A launcher (`accelerate launch`, `torchrun`) starts them, all with the same program; without one there is one process.
Each iterates over all batches and takes its share of the samples of each, so that a batch is as large as in one
process, and gradients are means over the whole of it.  What looks at a batch as a whole (batch norms, relational
distillation) sees the share.  Random numbers are drawn alike in all processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import samples
from smelt.core.errors import ModelError


class Processes:
    """Args:
        device: 'cpu' or 'cuda:1', of this process.

    Raises:
        ModelError: a launcher started several processes, and accelerate is not installed, or is to shard the model.
    """

    def __init__(self, device: str):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self._accelerator: Any = None
        if self.count == 1:
            self.rank = 0
            return
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError:
            raise ModelError(
                f"this is process {self.rank} of {self.count}, which need accelerate: pip install 'smelt[accelerate]'"
            ) from None
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(cpu=device.startswith("cpu"), kwargs_handlers=[unused])
        if "MULTI" not in str(self._accelerator.distributed_type):
            raise ModelError(
                f"accelerate is set to {self._accelerator.distributed_type}; several processes train with copies of "
                "the model (DDP), not with shares of it"
            )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wrap(self, step: nn.Module) -> nn.Module:
        """A module whose gradients are means over the processes; they start from what the first one has."""
        return step if self._accelerator is None else self._accelerator.prepare_model(step)  # type: ignore[no-any-return]

    def alone(self, step: nn.Module, yes: bool) -> AbstractContextManager[Any]:
        """Meanwhile gradients stay with each process, if `yes`."""
        return step.no_sync() if yes and self._accelerator is not None else nullcontext()  # type: ignore[operator,no-any-return]

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
