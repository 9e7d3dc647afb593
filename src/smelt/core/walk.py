"""A model walked through in the order in which it runs: what one part sees is gathered after those before it changed.

The parts are the blocks of the model (the elements of its lists and sequences) and, one by one, layers outside of
them.  What enters the first block is caught; where the next block is fed by the one before it, only that block runs
again.  Elsewhere the whole model runs again, up to the part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.data import batch, evaluating, forward_or_raise, move, tensors
from smelt.core.edit import submodule
from smelt.core.errors import DataError, ModelError
from smelt.core.named import first_line
from smelt.core.statistic import Statistic, Watch, taken, wanted_of
from smelt.core.target import Target

Gather = Callable[[Sequence[str]], dict[str, dict[str, Any]]]
Call = tuple[tuple[Any, ...], dict[str, Any]]
DOING = "while it runs part by part"


class _Stop(BaseException):
    """What is wanted has been seen; the rest of the model need not run."""


def walk(
    model: nn.Module,
    members: Sequence[Target],
    batches: Iterable[Any],
    limit: int | None,
    order: str,
    pairs: bool = False,
) -> Iterator[tuple[list[Target], Gather]]:
    """(members of a part, function that gathers statistics of values for them), part by part.

    What is done to the members before the next part is asked for is what that part sees; statistics of pairs also know
    what it saw before anything was done to them.

    Args:
        limit: number of batches to use; None for all.
        order: 'block': the layers of a block are one part; 'layer': only those that have their input in common.
        pairs: members may change before statistics of pairs are gathered for the first time.

    Raises:
        DataError: no batches.
        ModelError: the forward pass fails.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    inputs = [batch(item)[0] for item in islice(batches, limit)]
    if not inputs:
        raise DataError("there is no calibration batch")
    with evaluating(model):
        scan = _Scan(model, members, move(inputs[0], device))
        runner = _Runner(model, inputs, device, scan, members)
        if pairs:
            runner.keep()
        for block, part in scan.parts(members, order):
            yield part, lambda names, block=block, part=part: runner.gather(block, part, names)  # type: ignore[misc]


@dataclass
class Block:
    """A block of a model, or a layer outside of them.

    members: those of the walk that stand in it, and `gather` as `walk` gives it.
    calls: what it is called with now, for every batch (its first call, where a pass has several).
    aims: the first tensor that the same module of another model gives on what enters it there.
    """

    path: str
    members: list[Target]
    gather: Gather
    calls: list[Call]
    aims: list[Tensor]


def rebuilt(
    model: nn.Module, original: nn.Module, members: Sequence[Target], batches: Iterable[Any], limit: int | None
) -> Iterator[Block]:
    """The blocks that hold members, in order, with what each ought to give: what it gives in the `original`.

    What is done to a block before the next is asked for is what that one sees.  Raises as `walk`, and ModelError: the
    original has no such module.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    inputs = [batch(item)[0] for item in islice(batches, limit)]
    if not inputs:
        raise DataError("there is no calibration batch")
    with evaluating(model), evaluating(original):
        scan = _Scan(model, members, move(inputs[0], device))
        runner = _Runner(model, inputs, device, scan, members)
        runner.keep()
        aim = _Stage(original, inputs, device, _Scan(original, [], move(inputs[0], device)))
        for block, part in scan.parts(members, "block"):
            for path in [block] if block is not None else dict.fromkeys(t.places[0][0] for t in part):
                own = part if block is not None else [t for t in part if t.places[0][0] == path]
                runner.now.go(path)
                aim.go(path)
                if not (runner.now.held and aim.held):
                    raise ModelError(f"{path} is never called {DOING}; take it out of the step")
                yield Block(path, own, partial(runner.gather, block, own), runner.now.held, aim.outputs())


def fresh(call: Call) -> Call:
    """The same call with copies of whatever is neither tensor nor plain: a cache of keys, say, that a run fills."""
    args, kwargs = call
    return tuple(_copied(a) for a in args), {k: _copied(v) for k, v in kwargs.items()}


def blocks(model: nn.Module) -> list[str]:
    """Paths of the elements of every list and sequence of modules that is in no other block."""
    found: list[str] = []

    def visit(path: str, module: nn.Module) -> None:
        many = _is_list(module)
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if many and not _is_list(child):
                found.append(below)
            else:
                visit(below, child)

    visit("", model)
    return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1


class _Scan:
    """What one forward pass shows: who runs when, who is fed by whom.

    calls: paths of members and blocks, as they are called.
    twin: path of a member -> the member called before it with the same input.
    fed: path of a block -> where in its call the output of the block before it stands, if all else is the same.
    """

    def __init__(self, model: nn.Module, members: Sequence[Target], inputs: Any):
        self.calls: list[str] = []
        self.twin: dict[str, str] = {}
        self.fed: dict[str, int | str] = {}
        self.blocks = blocks(model)
        self._last: tuple[str, Any] = ("", None)
        self._before: tuple[Call, Any] | None = None
        watched = dict.fromkeys(t.places[0][0] for t in members)
        with ExitStack() as hooks:
            for path in dict.fromkeys((*self.blocks, *watched)):
                module = submodule(model, path)

                def enter(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
                    self._enter(path, path in watched, args, kwargs)

                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for path in self.blocks:

                def leave(_: Any, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
                    self._before = ((args, kwargs), _hidden(out))

                module = submodule(model, path)
                hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            forward_or_raise(model, inputs, DOING)
        self._last, self._before = ("", None), None
        count = {path: self.calls.count(path) for path in self.blocks}
        self.blocks = sorted((p for p in self.blocks if count[p] == 1), key=self.calls.index)
        self.fed = {p: at for p, at in self.fed.items() if count.get(p) == 1}

    def _enter(self, path: str, member: bool, args: Any, kwargs: Any) -> None:
        self.calls.append(path)
        x = next(tensors((args, kwargs)), None)
        if member:
            if x is not None and x is self._last[1]:
                self.twin[path] = self._last[0]
            self._last = (self.twin.get(path, path), x)
        if path in self.blocks and self._before is not None:
            at = _where_fed(self._before, (args, kwargs))
            if at is not None:
                self.fed[path] = at

    def block_of(self, target: Target) -> str | None:
        path = target.places[0][0]
        return next((b for b in self.blocks if path == b or path.startswith(f"{b}.")), None)

    def ends(self, block: str | None, part: Sequence[Target]) -> bool:
        """Whether the layer of the block that is called last is in the part: then little is left to run after it."""
        inside = [path for path in self.calls if block is not None and path.startswith(f"{block}.")]
        return bool(inside) and inside[-1] in {t.places[0][0] for t in part}

    def parts(self, members: Sequence[Target], order: str) -> Iterator[tuple[str | None, list[Target]]]:
        """(block or None, members) in the order in which they run; what did not run comes last."""
        late = len(self.calls)
        ranks = {p: self.calls.index(p) if p in self.calls else late for t in members for p in [t.places[0][0]]}
        groups: dict[Any, list[Target]] = {}
        for target in sorted(members, key=lambda t: ranks[t.places[0][0]]):
            path, block = target.places[0][0], self.block_of(target)
            leader = self.twin.get(path, path) if order == "layer" or block is None else ""
            groups.setdefault((block, leader), []).append(target)

        def rank(item: tuple[Any, list[Target]]) -> tuple[int, int]:
            own = ranks[item[1][0].places[0][0]]
            return (own if item[0][0] is None else self.calls.index(item[0][0]), own)

        for (block, _), part in sorted(groups.items(), key=rank):
            yield block, part


class _Runner:
    """Gathers for one part after another."""

    def __init__(self, model: nn.Module, inputs: list[Any], device: Any, scan: _Scan, members: Sequence[Target]):
        self.model, self.scan, self.members = model, scan, members
        self.now, self.before = (_Stage(model, inputs, device, scan) for _ in range(2))
        self.untouched: list[Tensor] = []  # of each member, if pairs are asked for

    def gather(self, block: str | None, part: Sequence[Target], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        leaders = {t.name: self._leader(t, part, names) for t in part}
        own = [t for t in part if leaders[t.name] is t]
        paths = list(dict.fromkeys(t.places[0][0] for t in own))
        watch = Watch(self.model, wanted_of(own, names))
        pairs = watch.asks("pairs")
        self.now.go(block)
        if pairs:
            self.keep()
            with self._as_before():
                self.before.go(block)
        whole = self.scan.ends(block, part)
        with watch:
            for index in range(len(self.now.inputs)):
                if pairs:
                    watch.before, watch.paused = {path: [] for path in paths}, True
                    with self._as_before():
                        self.before.reach(block, index, paths, watch.before, whole)
                    watch.paused = False
                self.now.reach(block, index, paths)
        found = watch.result()
        return {t.name: taken(found, leaders[t.name], names) for t in part}

    def keep(self) -> None:
        """Know the members as they are now, unless an earlier state is known."""
        self.untouched = self.untouched or [t.tensor.detach().clone() for t in self.members]

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Meanwhile the members hold what they held when the walk began."""
        changed = [t.tensor.data for t in self.members]
        for target, tensor in zip(self.members, self.untouched, strict=True):
            target.tensor.data = tensor
        try:
            yield
        finally:
            for target, tensor in zip(self.members, changed, strict=True):
                target.tensor.data = tensor

    def _leader(self, target: Target, part: Sequence[Target], names: Sequence[str]) -> Target:
        """The first of the part that sees the same input in the same way."""
        path = target.places[0][0]
        for other in part:
            if other is target:
                break
            if self.scan.twin.get(path) == other.places[0][0]:
                kinds = [shelf.load("statistics", name, Statistic).kind for name in names]
                if all(kind(target.module) is not None and kind(target.module) == kind(other.module) for kind in kinds):
                    return other
        return target


class _Stage:
    """Holds what enters one block, for every batch."""

    def __init__(self, model: nn.Module, inputs: list[Any], device: Any, scan: _Scan):
        self.model, self.inputs, self.device, self.scan = model, inputs, device, scan
        self.held: list[Call] = []
        self.at: str | None = None  # the block that `held` enters
        self.left: dict[int, Any] = {}  # what that block gave for a batch, where it was run to its end

    def reach(
        self,
        block: str | None,
        index: int,
        paths: Sequence[str],
        seen: dict[str, list[Tensor]] | None = None,
        whole: bool = False,
    ) -> None:
        """Run one batch until the last of the modules is called; `seen` takes what they are called with.

        whole: run the block to its end and keep what it gave; for a model that does not change meanwhile.
        """
        left = sum(self.scan.calls.count(path) for path in paths)

        def passed(args: Any, kwargs: Any, path: str) -> None:
            nonlocal left
            left -= 1
            if seen is not None:
                seen[path] += [x for x in islice((x for x in tensors((args, kwargs)) if x.is_floating_point()), 1)]
            if left == 0 and not whole:
                raise _Stop

        with ExitStack() as hooks:
            for path in paths:
                handle = submodule(self.model, path).register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: passed(args, kwargs, path), with_kwargs=True
                )
                hooks.callback(handle.remove)
            out = self._run(block, index)
        if whole:
            self.left[index] = _hidden(out)

    def _run(self, block: str | None, index: int) -> Any:
        try:
            if block is None:
                return forward_or_raise(self.model, move(self.inputs[index], self.device), DOING)
            args, kwargs = fresh(self.held[index])
            try:
                return submodule(self.model, block)(*args, **kwargs)
            except Exception as error:
                raise ModelError(f"the model fails {DOING}, in {block}: {first_line(error)}") from error
        except _Stop:
            return None

    def go(self, block: str | None) -> None:
        """Let `held` be what enters `block`, now."""
        if block is None or self.at == block:
            return
        order = self.scan.blocks
        start = order.index(self.at) + 1 if self.at in order else len(order)
        between = order[start : order.index(block) + 1] if block in order else []
        if not between or not all(path in self.scan.fed for path in between):
            return self._catch(block)
        for path in between:
            for index, (args, kwargs) in enumerate(self.held):
                new = self.left.pop(index) if index in self.left else _hidden(self._run(self.at, index))
                at = self.scan.fed[path]
                if isinstance(at, int):
                    self.held[index] = ((*args[:at], new, *args[at + 1 :]), kwargs)
                else:
                    self.held[index] = (args, {**kwargs, at: new})
            self.at = path

    def outputs(self) -> list[Tensor]:
        """What the block gives for every batch.  Raises ModelError: no tensor."""
        self.left = {index: _hidden(self._run(self.at, index)) for index in range(len(self.held))}
        if any(x is None or not x.is_floating_point() for x in self.left.values()):
            raise ModelError(f"{self.at} gives no floating tensor that what is learned could be compared with")
        return list(self.left.values())

    def _catch(self, block: str) -> None:
        self.held, self.at, self.left = [], block, {}

        def caught(_: Any, args: Any, kwargs: Any) -> None:
            self.held.append(fresh((args, kwargs)))
            raise _Stop

        handle = submodule(self.model, block).register_forward_pre_hook(caught, with_kwargs=True)
        try:
            for index in range(len(self.inputs)):
                self._run(None, index)
        finally:
            handle.remove()


def _hidden(out: Any) -> Tensor | None:
    return next(tensors(out), None)


def _where_fed(before: tuple[Call, Any], now: Call) -> int | str | None:
    """Where in a call the output of the call before stands, if the rest of both calls is the same."""
    (args, kwargs), out = before
    spots: list[int | str] = [i for i, x in enumerate(now[0]) if x is out]
    spots += [k for k, x in now[1].items() if x is out]
    if out is None or len(spots) != 1 or len(args) != len(now[0]) or set(kwargs) != set(now[1]):
        return None
    rest = [(a, b) for i, (a, b) in enumerate(zip(args, now[0], strict=True)) if i != spots[0]]
    rest += [(a, now[1][k]) for k, a in kwargs.items() if k != spots[0]]
    return spots[0] if all(_same(a, b) for a, b in rest) else None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, (bool, int, float, str)) and type(a) is type(b) and bool(a == b))


def _copied(value: Any) -> Any:
    if isinstance(value, (Tensor, nn.Module, bool, int, float, str, type(None))):
        return value
    if type(value) in (tuple, list):
        return type(value)(_copied(v) for v in value)
    return copy.deepcopy(value)
