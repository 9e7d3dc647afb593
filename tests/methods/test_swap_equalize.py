from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import smelt
from smelt.core.method import Stats, make
from tests.methods.test_swap_norms import IMAGES, Residual, lively, swapped


def test_equation_11_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, -2.0], [0.5, 0.25]]))
        model[0].bias.copy_(torch.tensor([4.0, 1.0]))
        model[2].weight.copy_(torch.tensor([[0.5, 1.0], [-2.0, 4.5]]))
    assert not swapped(model, torch.ones(1, 2), "swap.equalize")
    # r1 = (8, 0.5), r2 = (2, 4.5): s = (sqrt(8 / 2), sqrt(0.5 / 4.5)) = (2, 1/3)
    torch.testing.assert_close(model[0].weight, torch.tensor([[4.0, -1.0], [1.5, 0.75]]))
    torch.testing.assert_close(model[0].bias, torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(model[2].weight, torch.tensor([[1.0, 1 / 3], [-4.0, 1.5]]))


def test_convolutions_around_additions_become_even(tmp_path: Path) -> None:
    model = lively(Residual())
    swapped(model, IMAGES, "swap.fold_norm")
    with torch.no_grad():
        for conv in (model.first, model.deep):
            conv.weight *= torch.logspace(-2, 2, 8)[:, None, None, None]
            conv.bias *= torch.logspace(-2, 2, 8)
    before, spread = model(IMAGES).detach(), _spread(model.deep.weight)
    swapped(model, IMAGES, "swap.equalize")
    assert float((model(IMAGES).detach() - before).abs().max() / before.abs().max()) < 1e-5
    assert _spread(model.deep.weight) < spread / 100
    # The convergence condition: what makes a unit has the range of what reads it.
    made, read = model.deep.weight.abs().amax((1, 2, 3)), model.back.weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(made, read, rtol=1e-3, atol=0)


def _spread(weight: Tensor) -> float:
    size = weight.detach().abs().flatten(1).amax(1)
    return float(size.max() / size.min())


def test_one_scale_per_tensor_is_enough_after_equalization() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        factor = torch.logspace(-2, 2, 16)
        model[0].weight *= factor[:, None]
        model[0].bias *= factor
        model[2].weight /= factor
    x = torch.randn(64, 8)
    worse = _rounded(model, x)
    swapped(model, x, "swap.equalize")
    assert _rounded(model, x) < worse / 5


@torch.no_grad()
def _rounded(model: nn.Sequential, x: Tensor) -> float:
    before, kept = model(x), {n: p.clone() for n, p in model.named_parameters()}
    codec = make("quantize.affine", {"bits": 6, "per": "tensor"})
    for layer in (model[0], model[2], model[4]):
        layer.weight.copy_(codec.encode(layer.weight, codec.fit(layer.weight, Stats())).decode())
    error = float((model(x) - before).norm() / before.norm())
    for name, value in model.named_parameters():
        value.copy_(kept[name])
    return error


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention whose keys and values are shared by pairs of heads, and a gated MLP."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width // 2, bias=True)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q = self.q(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = (f(y).unflatten(2, (self.heads // 2, -1)).transpose(1, 2) for f in (self.k, self.v))
        k, v = (z.repeat_interleave(2, 1) for z in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.Sequential(Block(16, 4, 24), Block(16, 4, 24))
        self.norm, self.head = Norm(16), nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


IDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(3))


def test_smoothquant_by_hand() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    x = torch.tensor([[1.0, -2.0, 5.0], [0.0, 3.0, -1.0]])
    seen, weight = model[0](x).detach().abs().amax(0), model[1].weight.detach().clone()
    before = model(x)
    swapped(model, x, "swap.equalize", by="activation", alpha=0.7)
    s = seen**0.7 / weight.abs().amax(0) ** 0.3  # eq. 4
    torch.testing.assert_close(model[1].weight, weight * s)
    torch.testing.assert_close(model[0].weight, 1 / s)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("settings", [{"by": "activation"}, {"by": "search", "bits": 3, "group": 8}, {"by": "range"}])
def test_a_decoder_stays_the_same(settings: dict[str, Any]) -> None:
    model = lively(Decoder())
    before, old = model(IDS), {n: p.clone() for n, p in model.named_parameters()}
    notes = swapped(model, IDS, "swap.equalize", **settings)
    torch.testing.assert_close(model(IDS), before, atol=1e-5, rtol=1e-4)
    moved = {n.removeprefix("blocks.0.") for n, p in model.named_parameters() if not torch.equal(p, old[n])}
    assert {"v.weight", "v.bias", "o.weight", "up.weight", "down.weight"} <= moved
    assert ("norm1.weight" in moved) == (settings["by"] != "range")
    assert "embed.weight" not in moved and any(n.startswith("embed.weight: blocks.0.norm1 divides") for n in notes)


def test_the_search_finds_less_error_than_rounding_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[5] = 60.0  # a channel that matters
    x = torch.randn(256, 32)
    codec = make("quantize.affine", {"bits": 3, "per": "group", "group": 16, "symmetric": False})

    @torch.no_grad()
    def error() -> float:
        w, y = model[1].weight.detach(), model[0](x).detach()
        return float((y @ (codec.encode(w, codec.fit(w, Stats())).decode() - w).T).norm())

    before, outputs = error(), model(x)
    swapped(model, x, "swap.equalize", by="search", bits=3, group=16)
    torch.testing.assert_close(model(x), outputs, atol=1e-4, rtol=1e-4)
    assert error() < 0.7 * before


def test_what_cannot_be_scaled_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    notes = swapped(model, torch.randn(2, 3), "swap.equalize")
    assert any(n.startswith("0.weight: ") and "sigmoid" in n for n in notes)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    assert any("put swap.fold_norm before" in n for n in swapped(model, IMAGES, "swap.equalize"))


def test_awq_stands_for_scaling_and_rounding(tmp_path: Path) -> None:
    model = lively(Decoder())
    job = smelt.Job(data=smelt.Data(train=[(IDS, IDS)]), latency=False)
    recipe = [{"quantize.awq": {"bits": 4, "group": 8, "on": ["*", "!embed", "!head"]}}]
    result = smelt.compress(model, recipe, job)
    result.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=Decoder().eval())
    assert torch.equal(loaded(IDS), result.model(IDS))
    assert not torch.equal(result.model.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    with torch.no_grad():
        assert 0 < float((result.model(IDS) - model(IDS)).norm() / model(IDS).norm()) < 0.2
