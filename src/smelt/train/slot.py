"""What `training` keeps of each tensor while it trains: its parameters, and the codecs that act on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smelt.core.encoded import Encoded
from smelt.core.method import Codec, State, Values, straight_through
from smelt.core.target import Target


@dataclass
class Link:
    """One codec acting on one tensor.

    watched: what it asked to see of training (see `Codec.needs_at`), and `seen` what was found so far.
    """

    codec: Codec
    label: str
    state: State | None = None
    watched: tuple[str, ...] = ()
    seen: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, x: Tensor, given: Tensor) -> None:
        """Take in the gradient of what the codec gives for `x`, once it is known."""
        if not (self.watched and given.requires_grad):
            return

        def arrived(gradient: Tensor) -> None:
            if "movement" in self.watched:
                total = self.seen.setdefault("movement", torch.zeros_like(x, requires_grad=False))
                total.addcmul_(x.detach(), gradient, value=-1)
            if "slope" in self.watched:
                self.seen["slope"] = gradient.detach()

        given.register_hook(arrived)


class Leaves(nn.Module):
    """Path of a floating leaf -> its parameter; a module, in which engines of several processes put shares."""

    def __init__(self, found: Mapping[str, nn.Parameter]):
        super().__init__()
        self._parameters.update(found)  # the names of paths are none that `register_parameter` takes

    def __contains__(self, path: str) -> bool:
        return path in self._parameters

    def __getitem__(self, path: str) -> nn.Parameter:
        found = self._parameters[path]
        assert found is not None
        return found

    def get(self, path: str, otherwise: Tensor) -> Tensor:
        found = self._parameters.get(path)
        return otherwise if found is None else found

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((path, self[path]) for path in self._parameters)


@dataclass
class Slot:
    """One tensor whose value is computed from its parameters at each forward pass.

    `leaves`: path of a floating leaf -> its parameter ('' for a tensor that is not stored yet).
    `carrier`: the path in `leaves` on which the links act.
    """

    target: Target
    encoded: Encoded | None
    leaves: Leaves
    carrier: str | None
    where: Tensor | None
    links: list[Link] = field(default_factory=list)

    def value(self) -> Tensor:
        if self.encoded is None:
            return self._chain(self.leaves[""]).to(self.target.tensor.dtype)
        chained = self._chain(self.leaves[self.carrier]) if self.carrier and self.links else None

        def now(path: str, leaf: Tensor) -> Tensor:
            if chained is not None and path == self.carrier:
                return chained
            x = self.leaves.get(path, leaf)
            return straight_through(x, narrow(x, leaf.dtype).to(x.dtype)) if x is not leaf and _is_byte(leaf) else x

        return self.encoded.map(now).decode()

    def _chain(self, x: Tensor) -> Tensor:
        for link in self.links:
            if link.state is not None:
                given = link.codec.simulate(x, link.state)
                link.watch(x, given)
                x = given
        return x

    def seen_by(self, link: Link | None) -> Values:
        """The values that reach a link (None: that leave the last), and the mask of earlier pruning."""
        index = len(self.links) if link is None else self.links.index(link)
        where = self.where
        with torch.no_grad():
            x = self.leaves[self.carrier or ""].detach()
            for earlier in self.links[:index]:
                if earlier.state is not None:
                    mask = earlier.codec.encode(x, earlier.state).where()
                    where = mask if where is None or mask is None else where & mask
                    x = earlier.codec.simulate(x, earlier.state)
            return Values(x, where)

    def current(self, tree: Encoded, rounded: dict[int, Tensor]) -> Encoded:
        """The tree with the trained leaves, in the dtypes they are stored in; `rounded` keeps shared leaves shared."""

        def trained(path: str, leaf: Tensor) -> Tensor:
            if path not in self.leaves:
                return leaf
            parameter = self.leaves[path]
            return rounded.setdefault(id(parameter), narrow(parameter, leaf.dtype))

        return tree.map(trained)


def slot_of(target: Target, tree: Encoded | None, shared: dict[int, nn.Parameter]) -> Slot:
    """A slot with a parameter for each floating leaf; `shared` keeps those that stand in several trees, by their id."""
    learn, device = target.tensor.requires_grad, target.tensor.device
    if tree is None:
        master = nn.Parameter(target.tensor.detach().float(), learn) if is_narrow(target) else target.tensor
        assert isinstance(master, nn.Parameter)
        return Slot(target, None, Leaves({"": master}), "", None)
    leaves = {}
    for path, leaf in tree.leaves():
        if leaf.is_floating_point():
            if id(leaf) not in shared:
                wide = leaf.detach().clone().to(device, _wide(leaf.dtype))
                shared[id(leaf)] = nn.Parameter(wide, learn)
            leaves[path] = shared[id(leaf)]
    carriers = [p for p in tree.carriers() if p in leaves]
    near = tree.map(lambda _, leaf: leaf.to(device))
    carrier, where = carriers[0] if len(carriers) == 1 else None, near.where()
    fits = where is not None and carrier is not None and where.shape == leaves[carrier].shape
    return Slot(target, near, Leaves(leaves), carrier, where if fits else None)


def is_narrow(target: Target) -> bool:
    """Parameters of less than 32 bits train through a wide master."""
    return target.parameter and target.tensor.requires_grad and target.tensor.dtype in (torch.float16, torch.bfloat16)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A detached copy in another floating dtype; numbers of one byte saturate."""
    x = x.detach()
    if dtype.itemsize == 1:
        most = torch.finfo(dtype).max
        x = x.clamp(-most, most)
    return x.to(dtype, copy=True)


def _is_byte(leaf: Tensor) -> bool:
    """Numbers so coarse that training must see them rounded."""
    return leaf.is_floating_point() and leaf.element_size() == 1


def stands_in(target: Target, path: str) -> bool:
    """Whether all of its places are in a module; '' is the model."""
    return not path or all(place == path or place.startswith(f"{path}.") for place, _ in target.places)


def flatten(owner: nn.Module, name: str, value: Tensor) -> None:
    """Recurrent layers read their weights from a list of their own."""
    if isinstance(owner, nn.RNNBase) and name in owner._flat_weights_names:
        owner._flat_weights[owner._flat_weights_names.index(name)] = value
