"""Parts that families of convolutional networks share; their layers are named as torchvision names them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from smelt.core.errors import ModelError, nearest

T = TypeVar("T")
Unit = Callable[..., nn.Sequential]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU, "gelu": nn.GELU},
    **{"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid, "none": nn.Identity},
}


def activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ModelError(f"no activation {name!r}{nearest(str(name), ACTIVATIONS)}; one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def rounded(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to a width, at least one of it, and at least 90 % of the width."""
    near = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return near if near >= 0.9 * channels else near + divisor


def each(value: T | Sequence[T], n: int, what: str) -> list[T]:
    """One value for each of `n`: a list as it is, anything else repeated.

    Raises:
        ModelError: a list of another length.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * n  # type: ignore[list-item]
    if len(value) != n:
        raise ModelError(f"{what} is {list(value)}; it takes one value, or {n} of them")
    return list(value)


def conv_norm(
    before: int,
    after: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: str = "none",
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> nn.Sequential:
    """Convolution without a bias, batch norm, activation (none is left out); an odd kernel keeps the size."""
    if kernel % 2 == 0:
        raise ModelError(f"a kernel of {kernel} cannot keep the size of an image; take {kernel - 1} or {kernel + 1}")
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(after, eps, momentum)
    return nn.Sequential(conv, norm) if act == "none" else nn.Sequential(conv, norm, activation(act))


class SqueezeExcite(nn.Module):
    """Scales every channel by what two 1x1 convolutions make of the means of all (arXiv:1709.01507, section 3)."""

    def __init__(self, channels: int, squeezed: int, act: str, gate: str):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.act = activation(act)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = activation(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.act(self.fc1(self.pool(x))))) * x  # type: ignore[no-any-return]


def inverted(
    unit: Unit,
    before: int,
    hidden: int,
    after: int,
    kernel: int,
    stride: int,
    act: str,
    squeeze: SqueezeExcite | None = None,
) -> list[nn.Module]:
    """1x1 to `hidden` channels unless it has them, depthwise, squeeze, 1x1 to `after`; `unit` is a `conv_norm`."""
    layers: list[nn.Module] = [unit(before, hidden, act=act)] if hidden != before else []
    layers.append(unit(hidden, hidden, kernel, stride, hidden, act))
    return [*layers, *([squeeze] if squeeze else []), unit(hidden, after)]


class Residual(nn.Module):
    """Adds what a block is given to what it returns.

    Args:
        adds: whether it does so.
        drop: share of samples for which the block is left out in training (arXiv:1603.09382).
    """

    def __init__(self, layers: Sequence[nn.Module], adds: bool, drop: float = 0.0):
        super().__init__()
        self.block = nn.Sequential(*layers)
        self._adds, self._drop = adds, drop

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        if not self._adds:
            return y
        if self.training and self._drop:
            y = y * y.new_empty(len(y), 1, 1, 1).bernoulli_(1 - self._drop) / (1 - self._drop)
        return x + y

    def extra_repr(self) -> str:
        return f"adds={self._adds}, drop={self._drop:g}"


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels [groups, n] in the order [n, groups] (arXiv:1707.01083, section 3.1)."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def classifier(features: Sequence[nn.Module], last: Sequence[nn.Module]) -> nn.Sequential:
    """Feature maps, the mean over each, then the layers that tell classes apart."""
    pool = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return named(features=nn.Sequential(*features), **pool, classifier=nn.Sequential(*last))


def fan_out(weight: Tensor) -> None:
    """He et al. 2015 (arXiv:1502.01852), for the backward pass."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def one_over_inputs(weight: Tensor) -> None:
    """As the authors' code of ShuffleNet has it."""
    nn.init.normal_(weight, 0, 1 / weight.shape[1])


def small(weight: Tensor) -> None:
    nn.init.normal_(weight, 0, 0.01)


def initialise(
    model: nn.Module, conv: Callable[[Tensor], None] = fan_out, linear: Callable[[Tensor], None] | None = small
) -> None:
    """Weights by these; biases zero.  `linear=None` leaves linear layers as torch makes them."""
    for module in model.modules():
        fill = conv if isinstance(module, nn.Conv2d) else linear if isinstance(module, nn.Linear) else None
        if fill is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            fill(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
