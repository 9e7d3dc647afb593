"""Gradients of the task's loss by weights, handed on one tensor at a time, so that never all are in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from smelt.core.data import forward_or_raise, logits_of, samples
from smelt.core.errors import DataError, SmeltError
from smelt.core.named import first_line

Loss = Callable[[Tensor, Any], Tensor]


class Gradients:
    """Context in which `backward` hands the gradient of each of `watched` to its function.

    Other parameters get no gradient meanwhile; `.grad` and `requires_grad` of all are as before afterwards.

    Args:
        watched: pairs of a floating parameter and what is called with its gradient.
        generator: for labels that are drawn, see `backward`.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Sequence[tuple[Tensor, Callable[[Tensor], None]]],
        loss: Loss,
        generator: Generator,
    ):
        self.model, self.loss, self.generator = model, loss, generator
        self.watched: dict[int, list[Callable[[Tensor], None]]] = {}
        self.tensors = {id(tensor): tensor for tensor, _ in watched}
        for tensor, function in watched:
            self.watched.setdefault(id(tensor), []).append(function)

    def __enter__(self) -> Gradients:
        parameters = {id(p): p for p in (*self.model.parameters(), *self.tensors.values())}
        self._before = [(p, p.requires_grad, p.grad) for p in parameters.values()]
        for key, p in parameters.items():
            p.grad = None
            p.requires_grad_(key in self.tensors)
        self._hooks = [t.register_post_accumulate_grad_hook(self._arrived) for t in self.tensors.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for p, learns, grad in self._before:
            p.requires_grad_(learns)
            p.grad = grad

    def _arrived(self, tensor: Tensor) -> None:
        assert tensor.grad is not None
        for function in self.watched[id(tensor)]:
            function(tensor.grad.detach())
        tensor.grad = None

    def backward(self, inputs: Any, labels: Any, draw: bool = False) -> None:
        """One forward and backward pass.

        Without labels they are drawn from the model's own outputs, as classes along the last dimension; with `draw`
        also in place of labels that are such classes.

        Raises:
            ModelError: the forward pass fails.
            DataError: the loss fails, or does not depend on the model.
        """
        with torch.enable_grad():
            logits = logits_of(forward_or_raise(self.model, inputs, "while gradients are taken"))
            if labels is None or (draw and _classes(labels, logits)):
                labels = self._drawn(logits.detach())
            try:
                value = self.loss(logits, labels)
            except SmeltError:
                raise
            except Exception as error:
                raise DataError(f"the task's loss fails while gradients are taken: {first_line(error)}") from error
            if not value.requires_grad:
                raise DataError("the task's loss does not depend on the weights whose gradients are asked for")
            value.backward()  # type: ignore[no-untyped-call]

    def _drawn(self, logits: Tensor) -> Tensor:
        flat = logits.float().cpu().reshape(-1, logits.shape[-1]).softmax(1)
        drawn = torch.multinomial(flat, 1, generator=self.generator)
        return drawn.reshape(logits.shape[:-1]).to(logits.device)


def _classes(labels: Any, logits: Tensor) -> bool:
    """Whether labels are numbers of entries in the last dimension."""
    return isinstance(labels, Tensor) and not labels.is_floating_point() and labels.shape == logits.shape[:-1]


def singly(inputs: Any, labels: Any) -> Iterator[tuple[Any, Any]]:
    """The samples of a batch, one by one, as batches of one; what has no row per sample goes with each."""
    n = samples(inputs)
    for i in range(n):
        yield _row(inputs, i, n), _row(labels, i, n)


def _row(tree: Any, i: int, n: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[i : i + 1] if tree.dim() and len(tree) == n else tree
    if isinstance(tree, Mapping):
        return {k: _row(v, i, n) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_row(v, i, n) for v in tree)
    return tree
