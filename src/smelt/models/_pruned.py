"""Models that torch.nn.utils.prune has pruned and that still carry its masks (`weight_orig`, `weight_mask`, a hook)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from smelt.core.encoded import Encoded
from smelt.core.store import store
from smelt.core.target import targets
from smelt.forms.sparse import Sparse

LABEL = "torch.nn.utils.prune"


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, name of the tensor) of everything that still has a mask."""
    for path, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                yield path, module, hook._tensor_name


def memo_of(model: nn.Module) -> dict[int, Tensor]:
    """What `copy.deepcopy` needs to copy such a model, whose masked tensors have a history that cannot be copied."""
    values = [module.__dict__.get(name) for _, module, name in _masked(model)]
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor)}


@torch.no_grad()
def take_over(model: nn.Module) -> list[str]:
    """Make its parameters plain again, in place, and let those that had a mask be stored as sparse.

    Returns their names; none for other models.
    """
    masks: dict[tuple[str, str], Tensor] = {}
    for path, module, name in list(_masked(model)):
        masks[path, name] = module.get_buffer(f"{name}_mask") != 0
        prune.remove(module, name)  # type: ignore[no-untyped-call]
    found = [t for t in targets(model) if t.places[0] in masks]
    for target in found:
        mask = masks[target.places[0]]
        parts = {"mask": mask, "values": target.tensor.detach().clone()}
        store(model, target, Encoded(Sparse(), parts, target.tensor.shape, target.tensor.dtype), LABEL)
    return [target.name for target in found]
