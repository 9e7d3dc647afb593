"""How often each entry of an embedding is looked up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import batch, evaluating, forward_or_raise, move, tensors
from smelt.core.edit import submodule
from smelt.core.errors import DataError


def shares(model: nn.Module, paths: Sequence[str], batches: Iterable[Any], limit: int) -> dict[str, Tensor]:
    """Path of an embedding -> float64 [entries], the share of the look-ups that each has in the batches.

    They are the diagonal of the second moments of its inputs as one-hot vectors.

    Raises:
        ModelError: the forward pass fails.
        DataError: nothing is looked up in one of them.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    found: dict[str, Tensor] = {}
    with evaluating(model), ExitStack() as hooks:
        for path in paths:
            module = submodule(model, path)
            assert isinstance(module, nn.Embedding)
            found[path] = torch.zeros(module.num_embeddings, dtype=torch.float64, device=module.weight.device)

            def called(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                index = next(tensors((args, kwargs)), torch.empty(0)).long().flatten()
                found[path] += torch.bincount(index, minlength=len(found[path]))

            hooks.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
        for item in islice(batches, limit) if paths else ():
            forward_or_raise(model, move(batch(item)[0], device), "while look-ups are counted")
    for path, count in found.items():
        if not bool(count.any()):
            raise DataError(
                f"no calibration batch reaches {path!r}, so its look-ups are not known; "
                f"take it out of the step with on: ['*', '!{path}']"
            )
    return {path: count / count.sum() for path, count in found.items()}
