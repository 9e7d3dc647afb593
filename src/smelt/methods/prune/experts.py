from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.apply import CALIBRATION_BATCHES
from smelt.core.data import batch, evaluating, forward_or_raise, move, tensors
from smelt.core.edit import Edit, Fill, Keep, Members, Note, Set
from smelt.core.errors import RecipeError
from smelt.core.method import Known, Rewrite
from smelt.core.named import first_line
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.graph.mixtures import Mixture, counts, join, mixtures


@dataclass(frozen=True)
class Experts(Rewrite):
    """Keep the experts of each mixture that calibration data needs most, and drop or merge the others.

    Experts are the members of a list of equal modules, or the slices of stacked parameters [experts, ...]; the router
    is the layer beside them with a weight [experts, features] that runs before them.  Of its logits z for each token
    come p = softmax(z) and the k experts that it chooses.  How much an expert is needed:

        routing     frequency x gate weight: the mean over tokens of p_e where e is chosen, else 0
        frequency   share of tokens for which e is chosen

    drop   experts and their rows of the router go (Lu et al.; there each subset is tried)
    merge  an expert that goes joins the kept one whose logits are most alike (the cosine over tokens); weights become
           the mean by frequency (Li et al. eq. 1 to 3, without the permutation of neurons)

    applies to: mixtures of experts with one router each; every module is run on its inputs to make sure
    needs a pretrained model: yes
    needs data: yes, a few batches of the task, without labels
    needs training: a little, to recover, most after merge
    good at: memory and files of models whose task needs few of their experts
    bad at: data unlike the calibration data; speed, as a token still gets k experts
    source: Lu et al. 2024, arXiv:2402.14800; Li et al. 2023, arXiv:2310.01334
    """

    ratio: float | None = setting(
        None, "share of the experts of each mixture to take out; 0.25 where nothing else is given", low=0, high=1
    )
    keep: int | None = setting(None, "number of experts of each mixture to keep", low=1)
    how: str = setting("drop", "what becomes of the others", choices=("drop", "merge"))
    score: str = setting("routing", "how much an expert is needed", choices=("routing", "frequency"))
    chosen: int | None = setting(None, "experts that a token gets, where no attribute of the router says it", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and self.keep is not None:
            raise RecipeError(f"{self.name}: ratio and keep each say how many stay; give one of them")

    @torch.no_grad()
    def plan(self, model: nn.Module, targets: Sequence[Target], known: Known) -> list[Edit]:
        found, reasons = mixtures(model)
        wanted = {id(t.tensor) for t in targets}
        share = {path: _selected(model.get_submodule(path), wanted) for path in [*reasons, *(m.experts for m in found)]}
        edits: list[Edit] = [Note(path, reason) for path, reason in reasons.items() if share[path]]
        if found:
            known.example(model, "to see which experts are used")
        watched = {m: seen for m, seen in self._watched(model, found, known).items() if not seen.late}
        if not any(share[m.experts] for m in watched):
            return [*edits, Note("", "the model has no mixture of experts")]
        kept = {m.path: (m.number, m.number) for m in watched}
        for m, seen in watched.items():
            if not share[m.experts]:
                continue
            reason, stay = seen.reason(m), m.number
            if share[m.experts] < 1:
                reason = "only some of its weights are selected"
            if not reason and (stay := self._stay(m)) < m.number:
                own = self._edits(model, m, seen, stay)
                reason = _fails(model, m, own, seen)
                edits += [] if reason else own
            if reason:
                edits.append(Note(m.experts, reason))
            kept[m.path] = (m.number, m.number if reason else stay)
        return [*edits, *_above(model, kept)]

    def _stay(self, m: Mixture) -> int:
        ratio = 0.25 if self.ratio is None else self.ratio
        stay = m.number - round(ratio * m.number) if self.keep is None else min(self.keep, m.number)
        if stay < self._top(m):
            said = f"{self.name} would keep {stay} of the {m.number} experts of {m.experts!r}"
            raise RecipeError(f"{said}, and a token gets {self._top(m)}")
        return stay

    def _top(self, m: Mixture) -> int:
        return min(self.chosen or m.top or 0, m.number)

    def _watched(self, model: nn.Module, found: Sequence[Mixture], known: Known) -> dict[Mixture, _Seen]:
        """Run the calibration batches once, and see what each router does."""
        seen = {m: _Seen(m.number, self._top(m)) for m in found}
        with evaluating(model), ExitStack() as hooks:
            for m, one in seen.items():
                router, whole = model.get_submodule(m.router), model.get_submodule(m.path)
                experts = model.get_submodule(m.experts)
                members = [*experts] if isinstance(experts, nn.ModuleList) else [experts]
                weight, bias = getattr(router, m.weight), getattr(router, "bias", None)

                def route(
                    _: nn.Module, args: Any, kwargs: Any, one: _Seen = one, w: Any = weight, b: Any = bias
                ) -> None:
                    x = next((t for t in tensors((args, kwargs)) if t.is_floating_point()), None)
                    one.route(x, w, b if isinstance(b, Tensor) else None)

                def enter(_: nn.Module, args: Any, kwargs: Any, one: _Seen = one) -> None:
                    one.call = one.call or copy.deepcopy((args, kwargs))

                def reach(_: nn.Module, args: Any, one: _Seen = one) -> None:
                    one.late |= not one.tokens

                hooks.callback(whole.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(router.register_forward_pre_hook(route, with_kwargs=True).remove)
                for member in members if m.experts != m.path else ():
                    hooks.callback(member.register_forward_pre_hook(reach).remove)
            device = next((t.device for t in (*model.parameters(), *model.buffers())), "cpu")
            for item in islice(known.batches or (), CALIBRATION_BATCHES):
                forward_or_raise(model, move(batch(item)[0], device), "while its routers are watched")
        return seen

    def _edits(self, model: nn.Module, m: Mixture, seen: _Seen, stay: int) -> list[Edit]:
        need = seen.gates if self.score == "routing" else seen.chosen
        index = tuple(sorted(need.argsort(descending=True, stable=True)[:stay].tolist()))
        edits = list(_merged(model, m, seen, index)) if self.how == "merge" else []
        if m.stacked:
            edits += [Keep(join(m.experts, name), 0, index) for name in m.stacked]
        else:
            edits.append(Members(m.experts, index))
        router = model.get_submodule(m.router)
        own = [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]
        if m.router == m.experts:
            own = [(m.weight, getattr(router, m.weight))]
        edits += [Keep(join(m.router, n), 0, index) for n, t in own if t.dim() and len(t) == m.number]
        if isinstance(router, nn.Linear):
            edits.append(Set(m.router, "out_features", stay))
        for path in dict.fromkeys((m.path, m.experts, m.router)):
            edits += [Set(path, name, stay) for name in counts(model.get_submodule(path), m.number)]
        return edits


@dataclass
class _Seen:
    """What a router did.

    chosen: [experts], tokens for which each was chosen; gates: the sum of its gate weights there.
    alike: [experts, experts], sums over tokens of products of logits.
    call: the first call of the whole mixture; late: whether experts ran before the router, which so is none.
    """

    number: int
    top: int
    tokens: int = 0
    call: Any = None
    late: bool = False
    odd: str = ""
    chosen: Tensor = field(init=False)
    gates: Tensor = field(init=False)
    alike: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.chosen, self.gates = torch.zeros(2, self.number, dtype=torch.float64)
        self.alike = torch.zeros(self.number, self.number, dtype=torch.float64)

    def route(self, x: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
        if x is None or x.shape[-1] != weight.shape[1]:
            self.odd = f"its router gets {'no tensor' if x is None else list(x.shape)}, not [..., {weight.shape[1]}]"
            return
        logits = functional.linear(x.detach().reshape(-1, x.shape[-1]).float(), weight.float(), bias).double().cpu()
        best, index = logits.softmax(-1).topk(self.top, -1)
        self.tokens += len(logits)
        self.chosen.index_add_(0, index.flatten(), torch.ones(index.numel(), dtype=torch.float64))
        self.gates.index_add_(0, index.flatten(), best.flatten())
        self.alike += logits.T @ logits

    def reason(self, m: Mixture) -> str:
        """Why the mixture is none, or ''."""
        if not self.tokens:
            return self.odd or f"no batch reaches its router {m.router!r}"
        return "" if self.top else f"no attribute of {m.router!r} says how many experts a token gets; give 'chosen'"


def _selected(module: nn.Module, wanted: set[int]) -> float:
    """Share of its weights that the step selects."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(id(p) in wanted for p in weights) / max(len(weights), 1)


def _merged(model: nn.Module, m: Mixture, seen: _Seen, index: Sequence[int]) -> Iterator[Edit]:
    """New values of the experts that stay: the mean, by frequency, of those that join them."""
    size = seen.alike.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    alike = (seen.alike / size / size[:, None])[:, list(index)]
    home = alike.argmax(1)
    home[list(index)] = torch.arange(len(index))
    share = torch.zeros(len(index), m.number, dtype=torch.float64)
    share[home, torch.arange(m.number)] = seen.chosen
    empty = share.sum(1) == 0
    share[empty, torch.tensor(index)[empty]] = 1
    share = share / share.sum(1, keepdim=True)
    experts = model.get_submodule(m.experts)
    if m.stacked:
        for name in m.stacked:
            stack = getattr(experts, name).detach().clone()
            mean = share.to(stack.device, torch.promote_types(stack.dtype, torch.float32)) @ stack.flatten(1).to(
                torch.promote_types(stack.dtype, torch.float32)
            )
            stack[list(index)] = mean.to(stack.dtype).reshape(len(index), *stack.shape[1:])
            yield Fill(join(m.experts, name), stack)
        return
    assert isinstance(experts, nn.ModuleList)
    for row, i in zip(share, index, strict=True):
        for name, parameter in experts[i].named_parameters():
            total = sum(float(s) * experts[j].get_parameter(name).detach().float() for j, s in enumerate(row) if s)
            assert isinstance(total, Tensor)
            yield Fill(f"{m.experts}.{i}.{name}", total.to(parameter.dtype))


def _fails(model: nn.Module, m: Mixture, edits: Sequence[Edit], seen: _Seen) -> str:
    """Why the mixture does not run after these edits, or ''; tried on a copy."""
    whole = model.get_submodule(m.path)
    args, kwargs = seen.call
    try:
        trial = copy.deepcopy(whole)
        with evaluating(whole):
            shapes = [t.shape for t in tensors(whole(*copy.deepcopy(args), **kwargs))]
        for edit in edits:
            _below(edit, m.path).apply(trial)
        with evaluating(trial):
            output = list(tensors(trial(*args, **kwargs)))
    except Exception as error:  # foreign code fails in any way it likes
        return f"it does not run with fewer experts: {first_line(error)}"
    if not output or output[0].shape != shapes[0] or not bool(torch.isfinite(output[0]).all()):
        return "with fewer experts it gives no finite tensor of the same shape"
    return ""


def _below(edit: Edit, path: str) -> Edit:
    """The same edit, seen from the module at `path`."""
    name = "tensor" if isinstance(edit, (Keep, Fill)) else "path"
    return replace(edit, **{name: getattr(edit, name)[len(path) :].removeprefix(".")})  # type: ignore[type-var]


def _above(model: nn.Module, kept: dict[str, tuple[int, int]]) -> Iterator[Edit]:
    """Attributes of the modules around all mixtures that count experts, where these agree."""
    for path, module in model.named_modules():
        sizes = {size for place, size in kept.items() if place != path and (not path or place.startswith(f"{path}."))}
        if len(sizes) == 1 and path not in kept:
            ((before, after),) = sizes
            if before != after:
                yield from (Set(path, name, after) for name in counts(module, before))
