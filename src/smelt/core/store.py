"""What is stored of a model: the trees beside its dense tensors, the edits, the states.

A compressed model in memory is the ordinary module with dense, decoded weights (so it runs, copies, exports as
before), and a `Store` that says what each tensor really is.  `store_of(model)` is the only way to it.  The store
refers to tensors by name, so that copies of the model carry a true copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.edit import Edit, Stored, apply_all, find
from smelt.core.encoded import Encoded
from smelt.core.errors import ModelError, RuleError
from smelt.core.method import Codec, Lossless, State
from smelt.core.source import Source
from smelt.core.target import Target, targets

# What a node adds to a file besides its leaves, in bytes (its entry in the tree, checksums); a lossless codec
# must save more than this.
NODE_BYTES = 16


@dataclass
class Entry:
    """One stored tensor and who stored it: ('2: share.kmeans', ...), for errors and reports."""

    encoded: Encoded
    steps: tuple[str, ...]


@dataclass
class Activation:
    """A codec at a module's input or output; installed as a hook.  What it does is simulated."""

    path: str
    at: str
    codec: Codec
    state: State
    handle: Any = field(default=None, repr=False, compare=False)

    def install(self, model: nn.Module) -> None:
        module = model.get_submodule(self.path)
        if self.at == "input":
            self.handle = module.register_forward_pre_hook(self._before)
        else:
            self.handle = module.register_forward_hook(self._after)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not inputs:
            raise ModelError(
                f"{self.path} is called with keywords only; a codec at its input needs a positional tensor"
            )
        return (self._pass(inputs[0]), *inputs[1:])

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return self._pass(output)

    def _pass(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        self.state.to(x.device)
        return self.codec.simulate(x, self.state)


@dataclass
class Store:
    entries: dict[str, Entry] = field(default_factory=dict)
    tails: dict[str, tuple[Lossless, ...]] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    source: Source | None = None

    def describe(self, name: str) -> str:
        entry = self.entries.get(name)
        return str(entry.encoded) if entry else "dense"


def store_of(model: nn.Module) -> Store:
    """The store of a model; an empty one is made at the first call."""
    found = model.__dict__.get("_smelt")
    if found is None:
        found = model.__dict__["_smelt"] = Store()
    return found  # type: ignore[no-any-return]


def has_store(model: nn.Module) -> bool:
    return "_smelt" in model.__dict__


def strip(model: nn.Module) -> None:
    """Forget what is stored of a model and take its activation codecs out; edits stay done."""
    model.__dict__.pop("_smelt", None)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Activation)]:
                del hooks[key]


@torch.no_grad()
def store(model: nn.Module, target: Target, encoded: Encoded, step: str) -> None:
    """Let `encoded` be what `target` is; the dense tensor becomes its decoded value."""
    entries = store_of(model).entries
    before = entries[target.name].steps if target.name in entries else ()
    entries[target.name] = Entry(encoded, (*before, step))
    renew(model, target, encoded)


@torch.no_grad()
def renew(model: nn.Module, target: Target, encoded: Encoded) -> None:
    """Exchange the tree of a stored target, because its leaves were trained."""
    entry = store_of(model).entries[target.name]
    if encoded.shape != target.tensor.shape:
        raise RuleError(f"{entry.steps[-1]}: {target} was stored with shape {list(encoded.shape)}")
    dense = encoded.decode()
    if not bool(torch.isfinite(dense).all()):
        raise RuleError(f"{entry.steps[-1]}: storing {target} gives NaN or infinite values")
    target.tensor.copy_(dense)
    entry.encoded = encoded


@torch.no_grad()
def check_fresh(model: nn.Module) -> None:
    """Raise ModelError if a stored tensor's dense value was changed behind the store's back."""
    entries = store_of(model).entries
    for target in targets(model):
        entry = entries.get(target.name)
        if entry and not torch.equal(entry.encoded.decode().to(target.tensor.device), target.tensor):
            raise ModelError(
                f"{target} was changed after {entry.steps[-1]} stored it; train it inside smelt.training(...)"
            )


def eat(
    codec: Codec, target: Target, model: nn.Module, step: str
) -> tuple[Encoded | None, str | None, Tensor, Tensor | None]:
    """What a lossy codec gets of a target: (tree or None, path of the leaf in it, x, where).

    Raises:
        RuleError: nothing floating is left but fp8 (rule 1), or statistics cannot be mapped to the leaf (rule 4).
    """
    entry = store_of(model).entries.get(target.name)
    if entry is None:
        if not target.tensor.is_floating_point():
            raise RuleError(
                f"{step}: {target} is {target.tensor.dtype}; only floating tensors can be stored in fewer bits"
            )
        return None, None, target.tensor.detach(), None
    leaves = dict(entry.encoded.leaves())
    floating = [p for p in entry.encoded.carriers() if leaves[p].is_floating_point() and leaves[p].element_size() > 1]
    if len(floating) > 1:
        raise RuleError(f"{step}: {target} keeps its values in several tensors, {entry.encoded}; none can stand for it")
    if not floating:
        raise RuleError(
            f"{step}: {target} has no floating values left to store; "
            f"{entry.steps[-1]} keeps it as {entry.encoded} (put {codec.name} before it, or take one of them out)"
        )
    x = leaves[floating[0]]
    if codec.needs_at("weight") and x.shape != target.tensor.shape:
        raise RuleError(f"{step}: statistics of {target} do not fit its stored values {list(x.shape)}")
    where = entry.encoded.where()
    return entry.encoded, floating[0], x, where if where is not None and where.shape == x.shape else None


def apply_edits(model: nn.Module, edits: Sequence[Edit], step: str) -> None:
    """Check all edits against what is stored (rule 5), then apply and record them."""
    held = store_of(model)
    for edit in edits if held.entries else ():
        hit = sorted(edit.touches(model) & set(held.entries))
        if hit:
            first = held.entries[hit[0]].steps[0]
            raise RuleError(f"{step} changes {hit[0]}, which {first} has already stored; put {step} before {first}")
    apply_all(model, edits)
    for edit in edits:
        if isinstance(edit, Stored):
            store(model, find(model, edit.tensor), edit.encoded, step)
    held.edits += [edit for edit in edits if edit.recorded]


def pack(part: Tensor | Encoded, tail: Sequence[Lossless]) -> Tensor | Encoded:
    """A stored tensor as it lies in a file: masked entries dropped, every leaf by the codec that makes it smallest."""
    if isinstance(part, Encoded):
        candidates = [_pack_parts(candidate, tail) for candidate in part.form.at_rest(part)]
        return min(candidates, key=rest_bytes)
    choices: list[Tensor | Encoded] = [part]
    if part.numel():
        choices += [c.encode(part, State()) for c in tail]
    return min(choices, key=rest_bytes)


def _pack_parts(node: Encoded, tail: Sequence[Lossless]) -> Encoded:
    return Encoded(node.form, {k: pack(p, tail) for k, p in node.parts.items()}, node.shape, node.dtype)


def rest_bytes(part: Tensor | Encoded) -> int:
    """Bytes of leaves plus what the nodes cost in a file."""
    if isinstance(part, Tensor):
        return part.numel() * part.element_size()
    return NODE_BYTES + sum(rest_bytes(p) for p in part.parts.values())
