"""Layers of a cut model fitted anew, in closed form, to what the original gave (He et al. 2017, arXiv:1707.06168).

The original and the cut model run side by side over the same samples.  Where a layer is about to be called in the cut
model, what enters it there and what the original gave at the same place are known, and its weights are exchanged
before it runs, so that every layer makes up for those before it.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from smelt.core.data import batch, evaluating, forward_or_raise, move, samples, tensors
from smelt.core.edit import Edit, Fill
from smelt.core.target import targets
from smelt.statistics.gram import damped

SAMPLES = 1024  # at most, of the calibration batches
PLACES = 32768  # at most, at which a layer is fitted; and 8 for each unknown
WAIT = 0.05  # seconds between two looks at whether the other side still runs
DOING = "while its layers are fitted"


@torch.no_grad()
def refit(
    original: nn.Module,
    cut: nn.Module,
    rows: Mapping[str, Sequence[int]],
    batches: Iterable[Any],
    *,
    weights: bool = True,
    damping: float = 0.01,
    seed: int = 0,
    only: Container[str] | None = None,
) -> list[Edit]:
    """Change the layers of `cut`, in the order in which they run, so that they give what those of `original` give.

    linear, convolution    W and b minimise |y - W x - b|^2 + damping |W - W_0|^2 mean x^2, with x what enters the
                           layer now, y what the original gave, W_0 the weight that it has; without `weights`, or
                           where it has no weight to be fitted, only b makes the means equal
    batch norm             without `weights`: mean and variance of what enters it now

    Layers that are called more than once, or that see what they saw before with the weight they had, stay as they are.

    Args:
        rows: name of a weight -> which of the original's outputs are left, where they are not all.
        batches: up to `SAMPLES` samples count, of batches that can be joined.
        only: paths of the layers that may change; None for all.

    Returns:
        Fill edits with what was changed; they are applied to `cut` already.

    Raises:
        ModelError: a forward pass fails.
    """
    device = next((t.device for t in (*original.parameters(), *original.buffers())), "cpu")
    inputs = move(_joined(batches), device)
    fit = _Fit(original, cut, rows, weights, damping, seed, only)
    with evaluating(original), evaluating(cut):
        fit.run(inputs)
    return fit.edits


class _Fit:
    def __init__(
        self,
        original: nn.Module,
        cut: nn.Module,
        rows: Mapping[str, Sequence[int]],
        weights: bool,
        damping: float,
        seed: int,
        only: Container[str] | None,
    ):
        self.original, self.cut, self.rows, self.only = original, cut, rows, only
        self.weights, self.damping = weights, damping
        self.generator = torch.Generator().manual_seed(seed)
        self.edits: list[Edit] = []
        self.given: queue.Queue[Any] = queue.Queue(maxsize=1)
        self.stop = threading.Event()

    def run(self, inputs: Any) -> None:
        paths = self._paths(inputs)
        self.side = threading.Thread(target=self._original, args=(inputs, paths), daemon=True)
        with ExitStack() as hooks:
            for path in paths:
                module = self.cut.get_submodule(path)
                met = module.register_forward_pre_hook(lambda m, args, path=path: self._met(path, args))
                hooks.callback(met.remove)
            self.side.start()
            try:
                forward_or_raise(self.cut, inputs, DOING)
            finally:
                self.stop.set()
                self.side.join()

    def _paths(self, inputs: Any) -> list[str]:
        """The layers that can be fitted, in the order in which they run."""
        own = Counter(path for t in targets(self.cut) for path, _ in t.places if len(t.places) > 1)
        calls: list[str] = []
        with ExitStack() as hooks:
            for path, module in self.cut.named_modules():
                if self.only is not None and path not in self.only:
                    continue
                kinds = (nn.Linear, _ConvNd) if self.weights else (nn.Linear, _ConvNd, _BatchNorm)
                if isinstance(module, kinds) and not isinstance(module, _ConvTransposeNd) and not own[path]:
                    seen = module.register_forward_pre_hook(lambda m, args, path=path: calls.append(path))
                    hooks.callback(seen.remove)
            forward_or_raise(self.cut, _first(inputs), DOING)
        return [path for path, count in Counter(calls).items() if count == 1]

    def _original(self, inputs: Any, paths: Sequence[str]) -> None:
        """Runs beside, in its own thread: hands on what each layer was given and gave."""
        with torch.no_grad(), ExitStack() as hooks:
            for path in paths:
                module = self.original.get_submodule(path)
                hooks.callback(
                    module.register_forward_hook(
                        lambda m, args, out, path=path: self._give(path, args[0] if args else None, out)
                    ).remove
                )
            try:
                forward_or_raise(self.original, inputs, DOING)
            except BaseException as error:
                self._give("", None, error)

    def _give(self, path: str, x: Any, out: Any) -> None:
        found = (path, *(t.clone() if isinstance(t, Tensor) else t for t in (x, out)))  # what comes may work in place
        while not self.stop.is_set():
            try:
                return self.given.put(found, timeout=WAIT)
            except queue.Full:
                pass
        if path:
            raise _Stopped

    def _take(self) -> tuple[str, Any, Any] | None:
        """What the original hands on next; None where it has finished."""
        while True:
            over = not self.side.is_alive()
            try:
                return self.given.get(timeout=WAIT)  # type: ignore[no-any-return]
            except queue.Empty:
                if over:
                    return None

    def _met(self, path: str, args: Any) -> None:
        """A layer is about to be called in the cut model."""
        if (found := self._take()) is None:
            return
        where, before, out = found
        if isinstance(out, BaseException):
            raise out
        x = args[0] if args else None
        if where != path or not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return
        module = self.cut.get_submodule(path)
        same = isinstance(before, Tensor) and before.shape == x.shape and torch.equal(before, x)
        if same and self._has_its_weight(path, module):
            return
        if isinstance(module, _BatchNorm):
            self._norm(path, module, x)
        else:
            self._layer(path, module, x, out)

    def _has_its_weight(self, path: str, module: Any) -> bool:
        """Whether its weight is what is left of the original's."""
        weight, rows = self.original.get_submodule(path).weight, self.rows.get(f"{path}.weight")
        if not isinstance(weight, Tensor) or module.weight is None:
            return True
        if rows is not None:
            weight = weight.index_select(0, torch.as_tensor(rows, device=weight.device))
        return weight.shape == module.weight.shape and torch.equal(weight, module.weight)

    def _norm(self, path: str, module: _BatchNorm, x: Tensor) -> None:
        if module.running_mean is None or module.running_var is None:
            return
        flat = x.transpose(0, 1).flatten(1).double()
        self._fill(f"{path}.running_mean", flat.mean(1))
        self._fill(f"{path}.running_var", flat.var(1))

    def _layer(self, path: str, module: Any, x: Tensor, y: Tensor) -> None:
        rows = self.rows.get(f"{path}.weight")
        dim = 1 if isinstance(module, _ConvNd) else -1
        if rows is not None:
            y = y.index_select(dim, torch.as_tensor(rows, device=y.device))
        y = y.movedim(dim, -1).flatten(0, -2)
        groups = getattr(module, "groups", 1)
        wanted = max(PLACES, 8 * module.weight[0].numel())
        picked = torch.randperm(len(y), generator=self.generator)[:wanted].sort().values.to(y.device)
        wide = torch.promote_types(x.dtype, torch.float32)
        seen = _rows(module, x, picked).to(wide)
        y = y[picked].to(wide)
        weight = module.weight.detach().to(wide).reshape(groups, -1, seen.shape[2])
        bias = module.bias
        missed = y.reshape(len(y), groups, -1).transpose(0, 1) - seen @ weight.mT  # [groups, places, out / groups]
        if bias is not None:
            missed -= bias.detach().reshape(groups, 1, -1)
        moved = torch.zeros_like(weight, dtype=torch.float64)
        shift = missed.double().mean(1)
        if self.weights:
            middle = seen.mean(1, keepdim=True) if bias is not None else torch.zeros_like(seen[:, :1])
            seen = seen - middle  # then the bias needs no column
            for g in range(groups):
                gram, products = seen[g].T @ seen[g], seen[g].T @ missed[g]
                moved[g] = torch.linalg.solve(damped(gram.double(), self.damping), products.double()).T
            shift = shift - (moved @ middle.double().mT)[..., 0]
            self._fill(f"{path}.weight", (weight + moved).reshape(module.weight.shape))
        if bias is not None:
            self._fill(f"{path}.bias", bias.detach() + shift.reshape(-1))

    def _fill(self, name: str, value: Tensor) -> None:
        if bool(torch.isfinite(value).all()):
            edit = Fill(name, value)
            edit.apply(self.cut)
            self.edits.append(edit)


class _Stopped(BaseException):
    """The cut model has finished; the original need not."""


def _rows(module: Any, x: Tensor, picked: Tensor) -> Tensor:
    """[groups, picked, k]: what each weight multiplies at the picked places, which are counted sample by sample."""
    if not isinstance(module, _ConvNd):
        return x.reshape(1, -1, x.shape[-1])[:, picked]
    dims = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
    for i, (kernel, stride, step) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, step * (kernel - 1) + 1, stride)[..., ::step]
    at = torch.unravel_index(picked, (len(x), *x.shape[2 : 2 + dims]))
    seen: Tensor = x.movedim(1, dims + 1)[at]  # [picked, in, *kernel]
    return seen.reshape(len(picked), module.groups, -1).transpose(0, 1)


def _joined(batches: Iterable[Any]) -> Any:
    """Inputs of up to `SAMPLES` samples as one batch, of batches that differ only in their number of samples."""
    taken: list[Any] = []
    count = 0
    for item in batches:
        inputs = batch(item)[0]
        if taken and _shapes(inputs) != _shapes(taken[0]):
            continue
        taken.append(inputs)
        count += samples(inputs)
        if count >= SAMPLES:
            break
    return _cat(taken)


def _shapes(inputs: Any) -> list[Any]:
    return [(t.shape[1:], t.dtype) if t.dim() else None for t in tensors(inputs)]


def _cat(trees: Sequence[Any]) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(list(trees)) if first.dim() else first
    if isinstance(first, Mapping):
        return {k: _cat([tree[k] for tree in trees]) for k in first}
    if isinstance(first, (tuple, list)):
        return tuple(_cat(list(column)) for column in zip(*trees, strict=True))
    return first


def _first(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree[:2] if tree.dim() else tree
    if isinstance(tree, Mapping):
        return {k: _first(v) for k, v in tree.items()}
    return tuple(_first(v) for v in tree) if isinstance(tree, (tuple, list)) else tree
