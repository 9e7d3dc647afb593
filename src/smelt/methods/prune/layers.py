from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from smelt.core.apply import CALIBRATION_BATCHES
from smelt.core.data import batch, evaluating, forward_or_raise, move, tensors
from smelt.core.edit import PLAIN, Edit, Note, Remove, Replace, put_module
from smelt.core.errors import RecipeError, SmeltError
from smelt.core.method import Known, Rewrite
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.record import ADD, Branch, Call, Record, branches, record

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Layers(Rewrite):
    """Take out the blocks, or the branches of blocks, that change what passes them least.

    A block is a module that gives what it is given plus something: a residual block, a transformer layer.  (Of nested
    ones it is the innermost with a sibling of its class in a list, else the innermost.)  A branch is the f of x + f(x)
    where nothing else reads f(x): an attention, an MLP, the convolutions of a residual block.  Both are found by
    running the first batch.  Their score, over calibration batches, is the mean of

        influence   1 - cos(x, y), the block influence (Men et al. eq. 3)
        angular     arccos(cos(x, y)) / pi (Gromov et al. eq. 2, which looks at last tokens only)

    for y what the block makes of x (a branch: x + f(x)); the cosine is over the last dimension, for more than three
    dimensions over all of a sample.  `count`, or a `ratio` of them, go, lowest first: in equal `rounds`, before each of
    which what is left is scored anew, or, with `consecutive`, those following one another whose first x and last y
    are closest.  In their place stands a layer that hands on its first argument, or zeros for a branch; the model is
    run to make sure.  What fails then stays, and is noted.

    applies to: residual networks and transformers of any kind; with residual: false, every module that keeps the shape
    needs a pretrained model: yes
    needs data: yes, a few batches without labels
    needs training: a little, to recover
    good at: deep language models: a quarter of the layers for a little quality; smaller and faster on everything
    bad at: shallow networks, whose every block matters
    source: Men et al. 2024, arXiv:2403.03853; Gromov et al. 2024, arXiv:2403.17887; He et al. 2024, arXiv:2406.15786
    """

    ratio: float | None = setting(
        None, "share of the blocks to take out; 0.25 where nothing else is given", low=0, high=1
    )
    count: int | None = setting(None, "number of blocks to take out", low=0)
    of: str = setting("blocks", "what is taken out", choices=("blocks", "branches"))
    score: str = setting("influence", "distance of what goes in and what comes out", choices=("influence", "angular"))
    rounds: int = setting(1, "times that what is left is scored", low=1)
    consecutive: bool = setting(False, "take out blocks that follow one another")
    residual: bool = setting(True, "blocks must hand on what they are given")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.count is not None:
            raise RecipeError(f"{self.name}: ratio and count each say how many go; give one of them")
        if self.consecutive and (self.rounds > 1 or self.of == "branches"):
            raise RecipeError(f"{self.name}: consecutive blocks go in one round; take rounds and of out")

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        example = known.example(model, "to find blocks by running the model, and to score them")
        made = record(model, example)
        found = self._blocks(made, model, targets) if self.of == "blocks" else self._branches(made, model, targets)
        notes: list[Edit] = []
        with _Trial(model, example) as trial:
            gone = self._pick(found, trial, known, notes)
        if not found:
            return [Note("", f"the model has no {self.of} that could go")]
        notes.append(Note("", f"took out {', '.join(gone) or 'nothing'} of {len(found)} {self.of}"))
        return [*trial.edits, *notes]

    def _blocks(self, made: Record, model: nn.Module, targets: Sequence[Target]) -> list[_Candidate]:
        wanted = {id(t.tensor) for t in targets}
        calls = [c for c in made.single() if c.same and c.path and c.x != c.y and _holds(c.module, wanted)]
        if self.residual:
            calls = [c for c in calls if made.carries(c.x, c.y, c.begin, c.end)]  # type: ignore[arg-type]
        several = _repeated(model)
        kept = _innermost([_Candidate(c.path, (c,)) for c in calls if c.path in several])
        paths = [c.name for c in kept]
        apart = [c for c in calls if not any(_nested(c.path, path) for path in paths)]
        return sorted([*kept, *_innermost([_Candidate(c.path, (c,)) for c in apart])], key=lambda c: c.calls[0].begin)

    def _branches(self, made: Record, model: nn.Module, targets: Sequence[Target]) -> list[_Candidate]:
        wanted = {id(t.tensor) for t in targets}
        found = branches(made, [c for c in made.single() if c.path and c.returns])
        whole = [_Candidate(b.last.path, (*b.inner, b.last), b) for b in found]
        return _innermost([c for c in whole if any(_holds(call.module, wanted) for call in c.calls)])

    def _pick(self, found: Sequence[_Candidate], trial: _Trial, known: Known, notes: list[Edit]) -> dict[str, float]:
        """Take out the lowest, one after the other; name -> score of those that went."""
        ratio = 0.25 if self.ratio is None else self.ratio
        count = round(ratio * len(found)) if self.count is None else self.count
        if found and count > len(found):
            raise RecipeError(f"{self.name}.count is {count}; there are {len(found)} {self.of} that could go")
        gone: dict[str, float] = {}
        left = list(found)
        if self.consecutive and count:
            run = self._closest(left, count, trial.model, known)
            return {c.name: score for c, score in run if self._try(c, trial, notes)}
        for i in range(self.rounds):
            share = count * (i + 1) // self.rounds
            scores = self._scores(left, trial.model, known) if share > len(gone) else {}
            for candidate in sorted(left, key=lambda c: scores.get(c.name, 0.0)):
                if len(gone) >= share:
                    break
                left.remove(candidate)
                if self._try(candidate, trial, notes):
                    gone[candidate.name] = scores[candidate.name]
        return gone

    def _try(self, candidate: _Candidate, trial: _Trial, notes: list[Edit]) -> bool:
        reason = trial.take_out(candidate)
        if reason:
            notes.append(Note(candidate.name, reason))
        return not reason

    def _scores(self, left: Sequence[_Candidate], model: nn.Module, known: Known) -> dict[str, float]:
        sums = {c.name: (0.0, 0) for c in left}

        def see(name: str, x: Tensor, y: Tensor) -> None:
            total, number = sums[name]
            distance = self._distance(x, y)
            sums[name] = total + float(distance.sum()), number + distance.numel()

        with ExitStack() as hooks:
            watch = _Additions(see)
            for c in left:
                hooks.enter_context(watch.on(c) if c.branch else _on_block(c, see))
            with watch:
                _run(model, known.batches or ())
        return {name: total / max(number, 1) for name, (total, number) in sums.items()}

    def _closest(
        self, left: Sequence[_Candidate], count: int, model: nn.Module, known: Known
    ) -> list[tuple[_Candidate, float]]:
        """The `count` blocks in a row with the least distance between what goes in and what comes out."""
        starts = [
            i
            for i in range(len(left) - count + 1)
            if all(left[j].calls[0].y == left[j + 1].calls[0].x for j in range(i, i + count - 1))
        ]
        if not starts:
            raise RecipeError(f"{self.name}.consecutive: there are no {count} blocks that follow one another")
        sums = dict.fromkeys(starts, 0.0)
        given: dict[int, Tensor] = {}
        order = {c.name: i for i, c in enumerate(left)}

        def see(name: str, x: Tensor, y: Tensor) -> None:
            given[order[name]] = x
            start = order[name] - count + 1
            if start in sums:
                sums[start] += float(self._distance(given[start], y).mean())

        with ExitStack() as hooks:
            for c in left:
                hooks.enter_context(_on_block(c, see))
            batches = _run(model, known.batches or ())
        best = min(starts, key=lambda i: sums[i])
        return [(left[i], sums[best] / batches) for i in range(best, best + count)]

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (t.flatten(1) if t.dim() > 3 else t for t in (x, y))
        cosine = functional.cosine_similarity(x.double(), y.double(), dim=-1)
        return 1 - cosine if self.score == "influence" else torch.arccos(cosine.clamp(-1, 1)) / torch.pi


@dataclass(frozen=True)
class _Candidate:
    """What may go: one block, or the modules of a branch, of which the last gives f(x)."""

    name: str
    calls: tuple[Call, ...]
    branch: Branch | None = field(default=None, compare=False)


def _innermost(found: Sequence[_Candidate]) -> list[_Candidate]:
    def around(c: _Candidate, d: _Candidate) -> bool:
        return any(d.name.startswith(f"{call.path}.") for call in c.calls)

    return [c for c in found if not any(around(c, d) for d in found)]


def _nested(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _repeated(model: nn.Module) -> set[str]:
    """Paths of the members of lists that have a sibling of their own class, which is no mere list."""
    found = set()
    for path, parent in model.named_modules():
        if isinstance(parent, _LISTS):
            kinds = [type(child) for child in parent.children()]
            prefix = f"{path}." if path else ""
            found |= {
                f"{prefix}{n}" for n, c in parent.named_children() if kinds.count(type(c)) > 1 and type(c) not in _LISTS
            }
    return found


def _holds(module: nn.Module, wanted: set[int]) -> bool:
    """Whether it holds weights, all of them selected."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    return bool(weights) and all(id(p) in wanted for p in weights)


def _run(model: nn.Module, batches: Iterable[Any]) -> int:
    device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
    number = 0
    with evaluating(model):
        for item in islice(batches, CALIBRATION_BATCHES):
            forward_or_raise(model, move(batch(item)[0], device), "while its blocks are scored")
            number += 1
    return number


def _on_block(candidate: _Candidate, see: Any) -> ExitStack:
    call = candidate.calls[0]
    given: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = [(args[0] if args else kwargs[call.argument]).clone()]  # the block may change it in place

    def after(_: nn.Module, args: Any, output: Any) -> None:
        see(candidate.name, given.pop(), next(t for t in tensors(output) if t.is_floating_point()))

    hooks = ExitStack()
    hooks.callback(call.module.register_forward_pre_hook(before, with_kwargs=True).remove)
    hooks.callback(call.module.register_forward_hook(after).remove)
    return hooks


class _Additions(TorchFunctionMode):
    """Sees x and x + f(x) of branches, where they are added."""

    def __init__(self, see: Any):
        super().__init__()
        self.see = see
        self.open: list[tuple[str, Tensor]] = []

    def on(self, candidate: _Candidate) -> ExitStack:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.open.append((candidate.name, next(t for t in tensors(output) if t.is_floating_point())))

        hooks = ExitStack()
        hooks.callback(candidate.calls[-1].module.register_forward_hook(hook).remove)
        return hooks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.open and getattr(func, "__name__", "") in ADD and len(args) > 1:
            for i, (name, f) in enumerate(self.open):
                if f is args[0] or f is args[1]:
                    x = args[1] if f is args[0] else args[0]
                    del self.open[i]
                    self.see(name, x, x + f)
                    break
        return func(*args, **(kwargs or {}))


class _Trial:
    """The model with blocks taken out for the time being; `edits` do the same for good."""

    def __init__(self, model: nn.Module, example: Any):
        self.model, self.example = model, example
        self.edits: list[Edit] = []
        self.shape = self._run().shape
        self.undo = ExitStack()

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def take_out(self, candidate: _Candidate) -> str:
        """Why the model does not run without it, or ''."""
        hooked = [m for c in candidate.calls for m in c.module.modules() if m._forward_hooks or m._forward_pre_hooks]
        if hooked:
            return "a hook acts in it (a codec at an input or output, say) and would be lost; put this step before"
        if candidate.branch is None:
            (call,) = candidate.calls
            tries = [[_edit(call, {})], [_edit(call, _attributes(call.module))]]
            expected = None
        else:
            last = candidate.calls[-1]
            with _zeroed(last.module):
                expected = self._run()
            zeros = _edit(last, {}, "zeros")
            tries = [[*(_edit(c, {}) for c in candidate.calls[:-1]), zeros], [zeros]]
        reason = ""
        for edits in tries:
            found = self._attempt(edits, expected)
            if not found:
                return ""
            reason = reason or found
        return reason

    def _attempt(self, edits: list[Edit], expected: Any) -> str:
        with ExitStack() as undo:
            for edit in edits:
                undo.enter_context(_exchanged(self.model, edit))
            try:
                output = self._run()
            except SmeltError as error:
                return f"without it {error}"
            if output.shape != self.shape:
                return f"without it the output is {list(output.shape)}, not {list(self.shape)}"
            if expected is not None and not torch.allclose(output, expected, rtol=1e-3, atol=1e-5):
                return "its place cannot be taken by zeros without changing more"
            self.undo.push(undo.pop_all())
            self.edits += edits
            return ""

    def _run(self) -> Tensor:
        with evaluating(self.model):
            output = forward_or_raise(self.model, self.example, "on the first batch")
        return next(t for t in tensors(output) if t.is_floating_point()).double()


def _edit(call: Call, attributes: Mapping[str, Any], gives: str = "x") -> Edit:
    if call.plain and gives == "x" and not attributes:
        return Remove(call.path)
    returns = [gives if r == "x" else r for r in call.returns] if isinstance(call.returns, list) else gives
    arguments = {"returns": returns, "argument": call.argument, "attributes": dict(attributes)}
    return Replace(call.path, "skip", {k: v for k, v in arguments.items() if v})


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes, which code around the module may read."""
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, PLAIN)}
    return {k: v for k, v in own.items() if not hasattr(nn.Module(), k)}


@contextmanager
def _exchanged(model: nn.Module, edit: Edit) -> Iterator[None]:
    path = edit.path  # type: ignore[attr-defined]
    old = model.get_submodule(path)
    edit.apply(model)
    try:
        yield
    finally:
        put_module(model, path, old)


@contextmanager
def _zeroed(module: nn.Module) -> Iterator[None]:
    def zero(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        first = next(i for i, t in enumerate(output) if isinstance(t, Tensor) and t.is_floating_point())
        return type(output)(torch.zeros_like(t) if i == first else t for i, t in enumerate(output))

    handle = module.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()
