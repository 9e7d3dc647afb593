from pathlib import Path

import pytest
import torch
from torch import nn

import smelt
from smelt.core.encoded import Encoded
from smelt.core.errors import RuleError
from smelt.core.method import Stats
from smelt.core.statistic import of_weights
from smelt.core.store import store_of
from smelt.core.target import targets
from smelt.methods.quantize.factored import Factored

from ..forms.tools import read


def low_rank(m: int = 40, n: int = 60, rank: int = 10, noise: float = 0.05) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    return factors + noise * torch.randn(m, n, generator=generator)


def encoded(x: torch.Tensor, where: torch.Tensor | None = None, **settings: object) -> Encoded:
    codec = Factored(**settings)  # type: ignore[arg-type]
    return codec.encode(x, codec.fit(x, Stats(where)))


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / x.norm())


@pytest.mark.parametrize(("bits", "share"), [(8, 0.995), (6, 0.96), (4, 0.95), (3, 0.75), (2, 0.7)])
def test_turns_are_better_than_rounding_once(bits: int, share: float) -> None:
    x = low_rank()
    u, s, v = torch.linalg.svd(x)
    left = u[:, :10] * s[:10].sqrt()
    step = left.abs().amax(0) / (2 ** (bits - 1) - 1)
    left = (left / step).round() * step
    once = error(x, left @ torch.linalg.lstsq(left, x).solution)
    found = error(x, read(encoded(x, rank=10, bits=bits, right="float32")))
    assert error(x, u[:, :10] * s[:10] @ v[:10]) <= found < share * once


def test_no_single_entry_can_be_better() -> None:
    x = low_rank(6, 9, 3, 0.3).double()
    tree = encoded(x, rank=2, bits=3, right="float32", rounds=200, tolerance=0.0)
    left, right = tree.parts["left"], tree.parts["right"]
    assert isinstance(left, Encoded) and isinstance(right, torch.Tensor)
    codes, scale = left.parts["codes"], left.parts["scale"]
    assert isinstance(codes, torch.Tensor) and isinstance(scale, torch.Tensor)
    least = (x - read(tree)).square().sum()
    assert int(codes.abs().max()) <= 3 and (right.abs().amax(1) == 1).all()
    for i in range(6):
        for k in range(2):
            for value in range(-3, 4):
                other = codes.double().clone()
                other[i, k] = value
                assert (x - other * scale @ right).square().sum() >= least - 1e-9
    # and B is that of least squares
    again = torch.linalg.lstsq(codes.double() * scale, x).solution
    torch.testing.assert_close(right.double(), again, atol=1e-6, rtol=0)


def test_the_share_gives_the_rank() -> None:
    x = torch.randn(8, 4, 3, 3)  # 8 x 36
    for share, rank in ((0.5, 3), (1.0, 6), (0.01, 1)):
        left = encoded(x, share=share).parts["left"]
        assert left.shape == (8, rank)
    wide = torch.zeros(4100, 4100, dtype=torch.float16)
    assert Factored(rank=1)._rank(wide.shape) == 2  # fewer numbers may not claim so many


def test_pruned_weights_do_not_count() -> None:
    x = low_rank(noise=0)
    where = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    loud, quiet = (read(encoded(x.where(where, v), where, rank=10, rounds=200))[where] for v in (1e6, 0.0))
    assert torch.equal(loud, quiet)
    zeros = read(encoded(x.where(where, 0), rank=10))[where]
    assert error(x[where], quiet) < 0.5 * error(x[where], zeros)


def test_weighted_errors_are_smaller_at_the_output() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 24, 3, bias=False)
    inputs = torch.randn(32, 6, 7, 7) * torch.tensor([5.0, 3, 1, 1, 0.2, 0.1])[:, None, None]
    target = targets(layer)[0]
    gathered = of_weights(layer, [target], ["gram"], [(inputs, None)])[target.name]
    x, expected = target.tensor.detach(), layer(inputs).detach()
    apart = []
    for weighted in (False, True):
        codec = Factored(weighted=weighted)
        y = read(codec.encode(x, codec.fit(x, Stats(gathered=gathered))))
        apart.append(error(expected, nn.functional.conv2d(inputs, y)))
    assert apart[1] < 0.75 * apart[0]
    with pytest.raises(RuleError, match="calibrate"):
        Factored(weighted=True).fit(x, Stats())


def test_round_trip_and_training_of_the_floating_factor(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 40), nn.Linear(40, 2))

    result = smelt.compress(build(), [{"quantize.factored": {"share": 0.6, "on": ["0", "1"]}}])
    result.save(tmp_path / "m.smelt")
    loaded, ids = smelt.load(tmp_path / "m.smelt", into=build()), torch.arange(50)
    assert torch.equal(loaded(ids), result.model(ids))
    before = store_of(loaded).entries["1.weight"].encoded
    with smelt.training(loaded, steps=3) as t:
        optimizer = torch.optim.Adam(t.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            loaded(ids).square().mean().backward()
            optimizer.step()
            t.step()
    after = store_of(loaded).entries["1.weight"].encoded
    changed = {path: not torch.equal(a, b) for (path, a), (_, b) in zip(before.leaves(), after.leaves(), strict=True)}
    assert changed["left.codes"] is False and changed["right"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_floating_factor_of_a_pruned_tensor_is_stored_again(inside: bool) -> None:
    model = nn.Sequential(nn.Linear(40, 30))
    first = smelt.compress(
        model, [{"prune.weights": {"ratio": 0.3}}, {"quantize.factored": {"right": "float32"}}]
    ).model
    dense, kept = first[0].weight.detach().clone(), first[0].weight != 0  # type: ignore[index]
    if inside:
        with smelt.training(first, [{"quantize.affine": {"bits": 8}}]):
            first(torch.ones(40))
        found = first[0].weight  # type: ignore[index]
    else:
        found = smelt.compress(first, [{"quantize.affine": {"bits": 8}}]).model[0].weight  # type: ignore[index]
    found = found.detach()
    assert 0 < float((found - dense).norm()) < 0.02 * float(dense.norm())
    assert torch.equal(found != 0, kept)


def test_what_is_left_alone() -> None:
    reasons = [Factored(weighted=True).refuses(t) for t in targets(nn.Conv2d(4, 4, 3, groups=2))]
    assert "one group" in str(reasons[0]) and "one dimension" in str(reasons[1])
    assert "bytes" in str(Factored(share=1.0, right="float32").refuses(targets(nn.Linear(4, 4))[0]))
