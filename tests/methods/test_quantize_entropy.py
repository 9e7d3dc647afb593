"""quantize.entropy: bits that are met, bits that go where they count, rounding with a price."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import smelt
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Stats, Values
from smelt.core.store import pack, rest_bytes, store_of
from smelt.grids import rate
from smelt.methods.code.entropy import Entropy as Coder
from smelt.methods.prune.weights import Weights
from smelt.methods.quantize.entropy import Entropy
from smelt.methods.quantize.gptq import GPTQ


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 12)).eval()


def inputs(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)) * torch.linspace(0.05, 1, 64)
    return torch.randn(n, 64, generator=generator) @ mix / 4


def job() -> smelt.Job:
    return smelt.Job(data=smelt.Data(train=list(inputs(1024).split(128))), latency=False)


def bits(model: nn.Module) -> float:
    """Of a weight, in streams of the coder; nodes of the trees, which a file has too, apart."""
    trees = [entry.encoded for entry in store_of(model).entries.values()]
    leaves = [leaf for t in trees for _, leaf in t.leaves()]
    return sum(8 * rest_bytes(pack(leaf, [Coder()])) for leaf in leaves) / sum(t.shape.numel() for t in trees)


def divergence(model: nn.Module, other: nn.Module) -> float:
    """Of what the two give, in nats per sample, on inputs that nobody was calibrated on."""
    x = inputs(2000, 1)
    with torch.no_grad():
        a, b = (m(x).log_softmax(1) for m in (model, other))
    return float((a.exp() * (a - b)).sum(1).mean())


@pytest.mark.parametrize("error", ["loss", "outputs", "weights"])
@pytest.mark.parametrize("target", [2.0, 3.0, 6.0])
def test_the_bits_asked_for_are_those_of_the_file(error: str, target: float) -> None:
    found = smelt.compress(net(), [Entropy(target, error=error)], job()).model
    nodes = 8 * 16 * 3 * 3 / 16512  # three that `rest_bytes` counts for each of three weights
    assert target * 0.96 < bits(found) < target * 1.05 + nodes


def test_the_loss_tells_where_bits_count() -> None:
    model = net()
    found = {e: smelt.compress(model, [Entropy(2.5, error=e)], job()).model for e in ("loss", "outputs", "weights")}
    lost = {e: divergence(model, m) for e, m in found.items()}
    assert lost["loss"] < 0.85 * lost["outputs"] and lost["outputs"] < 0.7 * lost["weights"]
    groups = smelt.compress(model, [GPTQ(3, group=32)], job()).model
    fewer = smelt.compress(model, [Entropy(3.3)], job()).model
    assert bits(fewer) < 0.95 * bits(groups) and divergence(model, fewer) < divergence(model, groups)


def test_without_data_it_is_plain_rounding_with_one_step() -> None:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    method = Entropy(step=0.25, error="weights")
    tree = method.encode(x, method.fit(x, Stats()))
    assert torch.equal(tree.parts["codes"], (x / 0.25).round().to(torch.int8))
    plain = (x / 0.25).round() * 0.25
    stretch = (x * plain).sum() / plain.square().sum()  # least squares
    torch.testing.assert_close(tree.decode(), plain * stretch)


@pytest.mark.parametrize("target", [1.0, 2.0, 3.0, 4.0])
def test_gaussian_weights_come_as_near_to_the_bound_as_theory_says(target: float) -> None:
    """Entropy-coded uniform quantization (Gish & Pierce 1968): errors of 0.348, 0.089, 0.0222, 0.0056 at 1..4 bits.

    The coder takes 0.7 % more than the entropy of so few codes, which is 4 % of the error at 4 bits.
    """
    x = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    method = Entropy(target, error="weights")
    tree = method.encode(x, method.fit(x, Stats()))
    expected = {1.0: 0.3483, 2.0: 0.0889, 3.0: 0.0222, 4.0: 0.0056}[target]
    assert float((tree.decode() - x).square().mean()) < 1.05 * expected
    assert abs(8 * rest_bytes(pack(tree.parts["codes"], [Coder()])) / x.numel() - target) < 0.02 * target


def test_a_price_widens_the_dead_zone_and_lowers_the_sum() -> None:
    u = torch.linspace(-3, 3, 6001)
    drawn = torch.randn(20000, generator=torch.Generator().manual_seed(0)).round()
    costs = rate.prices(drawn)
    torch.testing.assert_close(costs[rate.LIMIT], torch.tensor(-math.log2(float((drawn == 0).float().mean()))))
    assert torch.equal(rate.rounder(costs, 0.0)(u), u.round())
    zones = []
    for price in (0.0, 0.05, 0.1, 0.2):
        codes = rate.rounder(costs, price)(u)
        zones.append(float(u[codes == 0].max()))

        def total(n: Tensor, price: float = price) -> Tensor:
            return (u - n).square() + price * costs[(n + rate.LIMIT).long()]

        others = torch.stack([total(u.round() + i) for i in (-1, 0, 1)]).amin(0)
        assert bool((total(codes) <= others + 1e-6).all())
    assert zones == sorted(zones) and zones[-1] > zones[0] + 0.05


def test_a_price_saves_bits_at_the_same_squared_error() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(300, 300, generator=torch.Generator().manual_seed(0)))
    curves: dict[float, list[tuple[float, float]]] = {}
    for price in (0.0, 0.15):
        for step in (1.2, 1.5, 1.9):
            method = Entropy(step=step, price=price, error="weights")
            tree = method.encode(x, method.fit(x, Stats()))
            found = 8 * rest_bytes(pack(tree.parts["codes"], [Coder()])) / x.numel()
            curves.setdefault(price, []).append((found, float((tree.decode() - x).square().mean())))
    (b0, e0), (b1, e1) = curves[0.0][1], curves[0.0][2]
    for found, lost in curves[0.15][:2]:
        at = e0 * (e1 / e0) ** ((found - b0) / (b1 - b0))
        assert lost < at


def test_pruned_weights_stay_zero_and_cost_nothing(tmp_path: Path) -> None:
    model = net()
    result = smelt.compress(model, [Weights(ratio=0.6), Entropy(2.0)], job())
    for name, entry in store_of(result.model).entries.items():
        assert str(entry.encoded) == "sparse(values: crossed)"
        assert float((dict(result.model.named_parameters())[name] == 0).float().mean()) >= 0.6
    kept = sum(int((p != 0).sum()) for p in result.model.parameters() if p.dim() > 1)
    codes = sum(8 * rest_bytes(pack(t, [Coder()])) for t in kept_codes(result.model))
    assert kept < codes and codes / (0.4 * sum(p.numel() for p in model.parameters() if p.dim() > 1)) < 2.1
    result.save(tmp_path / "a.smelt")
    again = smelt.load(tmp_path / "a.smelt", into=net())
    assert torch.equal(again(inputs(5)), result.model(inputs(5)))


def kept_codes(model: nn.Module) -> list[Tensor]:
    found = []
    for entry in store_of(model).entries.values():
        leaves = dict(entry.encoded.leaves())
        found.append(next(leaf for path, leaf in leaves.items() if path.endswith("codes"))[leaves["mask"]])
    return found


@torch.no_grad()
def test_a_grouped_convolution_is_two_layers_of_its_patches() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), torch.randn(6, 4, 7, 7)
    gathered = {}
    patches = functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 2, 18).double()
    slopes = torch.randn(50, 2, 3).double()
    gathered["gram"] = torch.einsum("pgi,pgj->gij", patches, patches) / len(patches)
    gathered["slopes"] = torch.einsum("pgi,pgj->gij", slopes, slopes)
    method = Entropy(step=2.0)
    both = method.encode(conv.weight, method.fit(conv.weight, Stats(gathered=gathered)))
    for group in range(2):
        own = conv.weight[3 * group : 3 * group + 3]
        known = {key: value[group : group + 1] for key, value in gathered.items()}
        alone = method._layer(own, None, known)
        found = both.decode()[3 * group : 3 * group + 3]
        assert error(own, found, known) < 1.05 * error(own, nearest(alone, own), known)


def error(w: Tensor, q: Tensor, known: dict[str, Any]) -> float:
    e = (w - q).flatten(1).double()
    return float(torch.trace(known["slopes"][0] @ e @ known["gram"][0] @ e.T))


def nearest(layer: rate.Layer, w: Tensor) -> Tensor:
    steps = layer.unit * 2.0
    return (w / steps).round() * steps


def test_any_tensor_without_data() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8), nn.ConvTranspose1d(8, 4, 3))
    model.forward = lambda x: model[2](model[1](model[0](x)).mT)  # type: ignore[method-assign]
    step = {"quantize.entropy": {"bits": 3, "error": "weights", "on": ["*", "1.bias"]}}
    found = smelt.compress(model, [step], smelt.Job(latency=False)).model
    assert set(store_of(found).entries) == {"0.weight", "1.weight", "1.bias", "2.weight"}
    assert 2.9 < 8 * sum(rest_bytes(pack(t, [Coder()])) for t in codes_of(found)) / 1136 < 3.3


def codes_of(model: nn.Module) -> list[Any]:
    return [entry.encoded.parts["codes"] for entry in store_of(model).entries.values()]


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="takes a number above 0"):
        Entropy(step=0.0)
    with pytest.raises(RecipeError, match="take one of the two out"):
        Entropy(2.5, step=0.1)
    with pytest.raises(RuleError, match="second moments of the layer's inputs"):
        Entropy().fit(torch.randn(4, 4), Stats())
    odd = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Flatten(1), nn.Linear(24, 6))
    data = smelt.Data(train=[torch.randn(8, 4, 4)])
    notes = " ".join(smelt.compress(odd, [Entropy()], smelt.Job(data=data, latency=False)).report.notes)
    assert "0.weight" in notes and "error: weights can" in notes


def test_a_plan_gives_all_tensors_one_step() -> None:
    tensors = {name: Values(torch.randn(30, 20) * scale) for name, scale in (("a", 1.0), ("b", 4.0))}
    plan = Entropy(3.0, error="weights").plan(tensors, {}, lambda _: 0)
    assert plan["a"] == plan["b"] and plan["a"].step is not None
