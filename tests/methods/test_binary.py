import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import smelt
from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Inside, Stats, make
from smelt.core.store import store_of
from smelt.core.target import targets
from smelt.methods.quantize.binary import Binary

from ..forms.tools import read


def stored(x: torch.Tensor, where: torch.Tensor | None = None, **settings: object) -> torch.Tensor:
    codec = Binary(**settings)  # type: ignore[arg-type]
    return read(codec.encode(x, codec.fit(x, Stats(where, seed=4))))


def error(x: torch.Tensor, **settings: object) -> float:
    return float((stored(x, **settings) - x).norm() / x.norm())


def test_the_sign_times_the_mean_size() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0], [0.0, -0.5, 1.0]])
    assert stored(x).tolist() == [[2.0, -2.0, 2.0], [0.5, -0.5, 0.5]]
    where = torch.tensor([[True, True, False], [False, True, True]])
    assert stored(x, where)[where].tolist() == [1.5, -1.5, -0.75, 0.75]
    assert stored(x, per="tensor")[0].tolist() == [1.25, -1.25, 1.25]
    assert stored(x, per="group", group=2)[0].tolist() == [1.5, -1.5, 3.0]
    assert stored(x, axis=1)[:, 1].tolist() == [-1.25, -1.25]


def test_a_threshold_splits_elsewhere() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    assert stored(x, threshold=2.0).tolist() == [[-2.0, 2.0, 2.0, -2.0]]  # mean of -1, 2, 3, 4


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_bases_are_least_squares_and_nearest_values(seed: int) -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    codec = Binary(bases=3)
    encoded = codec.encode(x, codec.fit(x, Stats()))
    scale, codes = encoded.parts["scale"], encoded.parts["codes"]
    assert isinstance(scale, torch.Tensor) and isinstance(codes, torch.Tensor)
    signs = torch.stack([(torch.arange(8) >> k & 1) * 2.0 - 1 for k in range(3)], 1).double()
    levels = signs @ scale  # [8, channels]
    nearest = (x[..., None] - levels.T[:, None]).abs().amin(-1)
    torch.testing.assert_close((read(encoded) - x).abs(), nearest)
    greedy = x.clone()
    for _ in range(3):
        greedy = greedy - torch.sign(greedy) * greedy.abs().mean(1, keepdim=True)
    assert ((read(encoded) - x).square().sum(1) <= greedy.square().sum(1) + 1e-9).all()


def test_more_bases_come_closer_and_bits_are_counted() -> None:
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    errors = [error(x, bases=k) for k in (1, 2, 3, 4)]
    assert errors[0] == pytest.approx(math.sqrt(1 - 2 / math.pi), abs=0.01)
    assert all(b < 0.65 * a for a, b in pairwise(errors))  # Lloyd-Max with 4 levels: 0.343


@pytest.mark.parametrize("shape", [(8, 64), (8, 3, 3, 3), (50,)])
def test_a_rotation_makes_heavy_tails_tame(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) ** 5
    assert error(x, rotate="hadamard") < 0.75
    if len(shape) == 2:
        assert error(x, rotate="hadamard") < error(x) - 0.1
    where = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    found = [stored(y, where, rotate="hadamard")[where] for y in (x, x.where(where, 1e6))]
    assert torch.equal(*found)


def test_the_gradients() -> None:
    x = torch.tensor([[-3.0, -1.0, 1.0, 1.0, 2.0]], requires_grad=True)
    size = math.sqrt(16 / 5)
    u = [abs(float(v)) / size for v in x.detach()[0]]
    t, k = 10**-0.5, 10**0.5
    expected = {
        "straight": [1.0] * 5,
        "clipped": [float(v <= 1) for v in u],
        "polynomial": [max(0.0, 2 - 2 * v) for v in u],
        "annealed": [k * max(0.0, math.sqrt(2) * t - t * t * v) for v in u],
    }
    for name, slopes in expected.items():
        codec = Binary(gradient=name, width=1.0)
        y = codec.simulate(x, codec.fit(x, Stats(inside=Inside(0.5))))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient[0].tolist() == pytest.approx(slopes), name


def rotations(codec: Binary, x: torch.Tensor, inside: Inside) -> smelt.core.method.State:
    return codec.fit(x, Stats(seed=1, inside=inside))


def test_learned_rotations_bring_signs_nearer() -> None:
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) ** 3
    codec = Binary(rotate="learned")
    state = rotations(codec, x, Inside())
    angles = []
    for _ in range(4):
        r1, r2 = state.get_buffer("r1"), state.get_buffer("r2")
        assert r1.shape == r2.shape == (6, 6)
        torch.testing.assert_close(r1 @ r1.T, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(r2.T @ r2, torch.eye(6), atol=1e-5, rtol=0)
        w = x.reshape(6, -1)
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True, correction=0)
        w = w.reshape(6, 6, 6)
        angles.append(float((r1.T @ w @ r2).abs().sum()))
        # what is stored: the signs of w + (R1^T w R2 - w) |sin b|, at the scale of the weights
        with torch.no_grad():
            state.get_parameter("angle").copy_(torch.linspace(0, 3, 6))
        share = torch.linspace(0, 3, 6).sin().abs()[:, None, None]
        expected = torch.where(w + (r1.T @ w @ r2 - w) * share >= 0, 1.0, -1.0).reshape(x.shape)
        expected *= x.abs().mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(read(codec.encode(x, state)), expected)
        before, state = state, rotations(codec, x, Inside(0.5, before=state))
        assert state is before
    assert all(b >= a - 1e-3 for a, b in pairwise(angles)) and angles[-1] > angles[0]
    assert angles[-1] > 1.02 * float(w.abs().sum())


def test_learned_rotations_train(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 1))
    x = torch.randn(64, 12, generator=generator)
    y = (x[:, :1] * x[:, 1:2]).sign()
    piece = {"quantize.binary": {"rotate": "learned", "gradient": "annealed", "on": "0"}}
    with smelt.training(model, [piece], steps=60, seed=3) as t:
        optimizer = torch.optim.Adam(t.parameters(), 0.02)
        first = {name: p.detach().clone() for name, p in t.named_parameters()}
        losses = []
        for step in range(60):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            t.step()
            losses.append(float(loss.detach()))
            if step == 20:
                turned = t.state()["0.weight/link0.r2"]
                t.epoch()
                assert not torch.equal(turned, t.state()["0.weight/link0.r2"])
        angle = "0.weight/link0.angle"
        assert not torch.equal(first[angle], dict(t.named_parameters())[angle])
        turned = t.state()["0.weight/link0.r2"]
        t.epoch()  # at the end scales follow, rotations stay
        assert torch.equal(turned, t.state()["0.weight/link0.r2"])
        inside = model(x).detach()
    assert losses[-1] < losses[0]
    encoded = store_of(model).entries["0.weight"].encoded
    assert str(encoded) == "binary"
    torch.testing.assert_close(model(x), inside)
    smelt.save(model, tmp_path / "m.smelt")
    again = smelt.load(tmp_path / "m.smelt", into=nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 1)))
    assert torch.equal(again(x), model(x))


def test_a_file_holds_a_bit_each(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3, bias=False), nn.Conv2d(32, 16, 1, bias=False))
    for rotate in ("none", "hadamard"):
        steps = [{"quantize.binary": {"rotate": rotate, "scales": "float16"}}, {"code.bits": {}}]
        result = smelt.compress(model, steps, smelt.Job(seed=1, latency=False))
        result.save(tmp_path / "m.smelt", force=True)
        other = nn.Sequential(nn.Conv2d(8, 32, 3, bias=False), nn.Conv2d(32, 16, 1, bias=False))
        loaded = smelt.load(tmp_path / "m.smelt", into=other)
        for name, p in result.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], p)
        bits = sum(e.encoded.shape.numel() for e in store_of(loaded).entries.values())
        assert (tmp_path / "m.smelt").stat().st_size < bits / 8 + 2 * 48 + 1200


def test_bad_settings() -> None:
    for wrong in (
        {"threshold": 1.0, "bases": 2},
        {"rotate": "learned", "bases": 2},
        {"rotate": "hadamard", "axis": 1},
    ):
        with pytest.raises(RecipeError, match=r"quantize\.binary"):
            make("quantize.binary", wrong)
    codec = Binary(rotate="learned")
    with pytest.raises(RuleError, match="inside train"):
        codec.fit(torch.randn(4, 4), Stats())
    prime = targets(nn.Linear(4099, 1, bias=False))[0]
    assert "4099 inputs" in str(codec.refuses(prime))
    assert "one dimension" in str(codec.refuses(targets(nn.Linear(3, 2))[1]))
    assert isinstance(Binary().encode(torch.ones(2), Binary().fit(torch.ones(2), Stats())), Encoded)
