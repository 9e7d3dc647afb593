"""Every kernel gives what the dense layer gives, from the forms that real codecs make."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.encoded import Encoded
from smelt.core.errors import ModelError
from smelt.core.kernel import Layer, Served, build, kernels
from smelt.core.method import State, Stats, make
from smelt.core.store import Activation
from smelt.forms.affine import Affine
from smelt.forms.codebook import Codebook
from smelt.forms.factors import Factors
from smelt.kernels import semi_structured
from smelt.kernels._matvec import MatVec, settle
from smelt.native import matvec

FEW = 1e-4  # of the largest output: inputs in 16 bits, sums in float32

pytestmark = pytest.mark.skipif(matvec.functions() is None, reason="the C library is not built")


def linear(rows: int = 20, columns: int = 64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(rows)
    return nn.Linear(columns, rows, bias=bias).eval()


def stored(module: nn.Linear, name: str, prune: bool = False, **settings: Any) -> Encoded:
    """Store the weight by a codec, after half of it was pruned, and leave the decoded values in the layer."""
    codec = make(name, settings)
    weight = module.weight.detach()
    outer, where = None, None
    if prune:
        first = make("prune.weights", {"ratio": 0.5})
        outer = first.encode(weight, first.fit(weight, Stats()))
        where, weight = outer.where(), outer.parts["values"]
    tree = codec.encode(weight, codec.fit(weight, Stats(where)))
    tree = outer.map(lambda path, leaf: tree if path == "values" else leaf) if outer is not None else tree
    with torch.no_grad():
        module.weight.copy_(tree.decode())
    return tree


def near(found: Tensor, wanted: Tensor, share: float = FEW) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


def served(name: str, module: nn.Linear, tree: Encoded | None, **more: Any) -> Served:
    found = build(name, Layer(module, tree, torch.Size((1, module.in_features)), **more))
    assert found is not None
    return found


AFFINE: list[dict[str, Any]] = [
    {"bits": 4, "per": "group", "group": 32},
    {"bits": 4, "per": "group", "group": 24, "symmetric": False},
    {"bits": 4, "symmetric": False, "zero": "whole"},
    {"bits": 2, "per": "tensor"},
    {"bits": 8},
    {"bits": 8, "per": "tensor", "symmetric": False},
    {"bits": 8, "per": "group", "group": 16, "symmetric": False, "scales": "float16"},
    {"bits": 6},
    {"bits": 1},
]


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("settings", AFFINE, ids=str)
def test_even_levels(settings: dict[str, Any], prune: bool) -> None:
    module = linear()
    tree = stored(module, "quantize.affine", prune, **settings)
    if prune and settings["bits"] == 1:  # 0 is none of two levels
        assert build("affine_matvec", Layer(module, tree, torch.Size((1, 64)))) is None
        return
    layer = served("affine_matvec", module, tree)
    near(layer.weight, module.weight.detach(), 1e-6)
    for shape in ((1, 64), (3, 64), (2, 5, 64), (64,), (0, 64)):
        x = torch.randn(shape)
        assert layer(x).shape == module(x).shape
        if x.numel():
            near(layer(x), module(x).detach())
    x = torch.randn(64, 6).T
    near(layer(x), module(x).detach())


@pytest.mark.parametrize(
    ("name", "settings", "coding"),
    [
        ("share.kmeans", {"clusters": 16}, "nibbles"),
        ("share.kmeans", {"clusters": 60}, "table"),
    ],
)
@pytest.mark.parametrize("prune", [False, True])
def test_few_values(name: str, settings: dict[str, Any], coding: str, prune: bool) -> None:
    module = linear(17, 48, bias=False)
    layer = served("table_matvec", module, stored(module, name, prune, **settings))
    assert isinstance(layer, MatVec)
    if not prune:
        assert layer.call.matrix.coding == coding
    assert torch.equal(layer.weight, module.weight)
    x = torch.randn(2, 48)
    near(layer(x), module(x).detach(), 1e-5)


def activation(**settings: Any) -> Activation:
    codec = make("quantize.affine", {"bits": 8, **settings})
    state = State()
    if not settings.get("dynamic", True):
        state = State(scale=torch.tensor(0.02), zero=torch.tensor(100, dtype=torch.int32))
    return Activation("", "input", codec, state)


@pytest.mark.parametrize("kernel", ["int8_matvec", "int8_linear"])
@pytest.mark.parametrize("settings", [{}, {"per": "token"}, {"dynamic": False}], ids=str)
def test_rounded_inputs(kernel: str, settings: dict[str, Any]) -> None:
    module = linear(24, 64)
    tree = stored(module, "quantize.affine", bits=8)
    at_input = activation(**settings)
    layer = build(kernel, Layer(module, tree, torch.Size((5, 64)), at_input))
    if kernel == "int8_linear" and settings.get("per") == "token":
        assert layer is None  # one range for all of x is what it can do
        return
    assert layer is not None and layer.takes_input
    x = torch.randn(5, 64) * torch.linspace(0.1, 3, 5)[:, None]
    wanted = module(at_input.codec.simulate(x, at_input.state)).detach()
    near(layer(x), wanted)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x))
    layer.most = 2  # beyond which it decodes
    near(layer(x), wanted)


def test_rounding_is_only_where_it_is_allowed() -> None:
    module = linear(24, 64)
    tree = stored(module, "quantize.affine", bits=8)
    for kernel in ("int8_matvec", "int8_linear"):
        assert build(kernel, Layer(module, tree, torch.Size((5, 64)))) is None
        layer = served(kernel, module, tree, rounds=True)
        x = torch.randn(5, 64)
        near(layer(x), module(x).detach(), 0.05)
        for other in ({"bits": 4}, {"symmetric": True}, {"zero": "float"}, {"range": "percentile"}):
            assert build(kernel, Layer(module, tree, torch.Size((5, 64)), activation(**other))) is None


def test_what_is_not_served() -> None:
    other = {
        "half": linear().half(),
        "narrow": linear(8, 12),
        "subclass": type("Mine", (nn.Linear,), {})(64, 20),
        "convolution": nn.Conv2d(4, 4, 1),
    }
    for module in other.values():
        parts = {"codes": torch.ones(module.weight.shape, dtype=torch.int8), "scale": torch.ones(len(module.weight))}
        tree = Encoded(Affine(0, 0, 8), parts, module.weight.shape, torch.float32)
        for name in kernels("cpu"):
            assert build(name, Layer(module, tree, torch.Size((1, 64)), rounds=True)) is None or name == "int8_linear"
    module = linear()
    values = torch.randn(300)
    parts = {"codebook": values, "indices": torch.arange(20 * 64, dtype=torch.int16).view(20, 64) % 300}
    many = Encoded(Codebook(), parts, module.weight.shape, torch.float32)
    assert build("table_matvec", Layer(module, many, torch.Size((1, 64)))) is None
    for name in kernels("cpu"):
        assert build(name, Layer(module, None, torch.Size((1, 64)), rounds=True)) is None


def test_factors() -> None:
    module = linear(20, 64)
    left, right = torch.randn(20, 3), torch.randn(3, 64)
    tree = Encoded(Factors(), {"left": left, "right": right}, module.weight.shape, torch.float32)
    with torch.no_grad():
        module.weight.copy_(tree.decode())
    layer = served("factors", module, tree)
    x = torch.randn(4, 64)
    near(layer(x), module(x).detach(), 1e-5)
    near(layer.weight, module.weight.detach(), 1e-6)


def test_two_of_four() -> None:
    weight = torch.randn(32, 64).half()
    assert not semi_structured.fits(weight)
    weight.view(-1, 4)[:, :2] = 0
    assert semi_structured.fits(weight) and not semi_structured.fits(weight.float())
    assert not semi_structured.fits(weight[:, :32]) and "semi_structured" not in kernels("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_of_four_on_a_gpu() -> None:
    module = linear(128, 256).half().cuda()
    with torch.no_grad():
        module.weight.view(-1, 4)[:, :2] = 0
    layer = build("semi_structured", Layer(module, None, torch.Size((32, 256))))
    if layer is not None:
        x = torch.randn(32, 256).half().cuda()
        near(layer(x), module(x).detach(), 5e-3)


def test_copies_gradients_and_wrong_inputs() -> None:
    module = linear()
    layer = served("affine_matvec", module, stored(module, "quantize.affine", bits=4))
    x = torch.randn(3, 64)
    again = copy.deepcopy(nn.Sequential(layer, nn.ReLU()))
    del layer.call
    near(again[0](x), module(x).detach())
    settle(again)
    near(again[0](x), module(x).detach())
    x.requires_grad_()
    again[0](x).sum().backward()
    assert x.grad is not None
    near(x.grad[0], functional.linear(torch.ones(20), module.weight.detach().T))
    for wrong in (torch.randn(3, 32), torch.randn(3, 64).double()):
        with pytest.raises(ModelError, match="the input is"):
            again[0](wrong)
