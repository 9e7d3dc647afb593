import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import smelt
from smelt.core.encoded import Encoded
from smelt.core.errors import RecipeError, RuleError
from smelt.core.method import Inside, State, Stats, make
from smelt.core.statistic import gather
from smelt.core.target import targets
from smelt.forms.sparse import Sparse
from smelt.grids.calibrated import RANGES
from smelt.methods.quantize.affine import Affine

SHAPES = [(12, 10), (8, 3, 3, 3), (6, 4, 5), (7,), (1, 1)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(x: torch.Tensor, where: torch.Tensor | None = None, **settings: Any) -> Encoded:
    codec = Affine(**settings)
    return codec.encode(x, codec.fit(x, Stats(where)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 9, 16])
def test_round_trip(bits: int, symmetric: bool, per: str, shape: tuple[int, ...]) -> None:
    x, codec = randn(*shape), Affine(bits=bits, symmetric=symmetric, per=per, group=4)
    state = codec.fit(x, Stats())
    tree = codec.encode(x, state)
    tree.form.check({k: (p.shape, p.dtype) for k, p in tree.leaves()}, tree.shape, tree.dtype)
    tree.form.awake(tree)
    assert torch.equal(tree.decode(), codec.simulate(x, state))
    if bits > 1:
        scale = tree.form.spread(tree.parts["scale"], x.shape)  # type: ignore[attr-defined]
        assert bool(((tree.decode() - x).abs() <= scale * 0.52).all())


def test_the_textbook_map() -> None:
    x = randn(30, 20) + 1
    tree = encode(x, bits=8, symmetric=False, per="tensor")
    exact = x.double().numpy()
    exact = (exact - exact.min()) / (exact.max() - exact.min()) * 255
    clear = np.abs(exact % 1 - 0.5) > 1e-3
    codes = tree.parts["codes"]
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(codes.numpy()[clear], np.round(exact)[clear])


def test_torch_quantizes_the_same() -> None:
    x = randn(16, 4, 3, 3)
    tree = encode(x)
    zeros = torch.zeros(16, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, tree.parts["scale"], zeros, 0, -127, 127)
    torch.testing.assert_close(tree.decode(), theirs)
    tree = encode(x, symmetric=False, zero="whole", per="tensor", bits=6)
    theirs = torch.fake_quantize_per_tensor_affine(x, tree.parts["scale"], tree.parts["zero"].int(), 0, 63)
    torch.testing.assert_close(tree.decode(), theirs)


def test_by_hand() -> None:
    x = torch.tensor([[1.0, -7.0, 3.2], [0.0, 0.0, 0.0]])
    tree = encode(x, bits=4)
    assert tree.parts["codes"].tolist() == [[1, -7, 3], [0, 0, 0]] and tree.parts["codes"].dtype == torch.int8
    assert tree.decode().tolist() == [[1, -7, 3], [0, 0, 0]]
    tree = encode(torch.tensor([[1.0, 3.0, -2.0, 2.0]]), bits=1)
    assert tree.decode().tolist() == [[2, 2, -2, 2]] and tree.parts["codes"].tolist() == [[1, 1, 0, 1]]


def test_where_the_scales_stand() -> None:
    x = randn(4, 6, 3)
    assert encode(x, axis=1).parts["scale"].shape == (6,)
    assert encode(x, per="tensor").parts["scale"].shape == ()
    grouped = encode(x, per="group", group=8, bits=4)
    assert grouped.parts["scale"].shape == (4, 3)  # 18 = 8 + 8 + 2
    top = x.reshape(4, 18)[:, 16:].abs().amax(1) / 7
    torch.testing.assert_close(grouped.parts["scale"][:, 2], top)
    for per in ("channel", "tensor", "group"):
        assert encode(randn(5), per=per).parts["scale"].shape == ()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_scales_in_half_precision(kind: str) -> None:
    x = randn(8, 64) * 10 ** torch.linspace(-5, 2, 8)[:, None]
    tree = encode(x, bits=4, per="group", scales=kind)
    assert tree.parts["scale"].dtype == getattr(torch, kind)
    assert tree.nbytes() == 8 * 64 + 8 * 2
    error = (tree.decode() - x).norm(dim=1) / x.norm(dim=1)
    assert float(error[1:].max()) < 0.16
    state = Affine(bits=4, per="group", scales=kind).fit(x, Stats())
    assert torch.equal(Affine(bits=4, per="group", scales=kind).simulate(x, state), tree.decode())


@pytest.mark.parametrize("settings", [{}, {"symmetric": False}, {"range": "mse"}, {"range": "percentile"}, {"bits": 1}])
@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
def test_masked_entries_do_not_count(settings: dict[str, Any], per: str) -> None:
    x, where = randn(6, 20), randn(6, 20, seed=1) > 0
    where[2] = False
    given = {"bits": 4, "per": per, **settings}
    quiet, loud = (encode(torch.where(where, x, fill), where, **given) for fill in (0.0, 1e6))
    assert torch.equal(quiet.decode()[where], loud.decode()[where])
    if settings != {"bits": 1}:
        assert bool((quiet.decode()[~where] == 0).all())  # the code of 0 is exact, so training sees what is stored
    inside = Encoded(Sparse(), {"mask": where, "values": quiet}, x.shape, x.dtype)
    assert bool((inside.decode()[~where] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = randn(8, 32).to(dtype)
    for settings in ({}, {"symmetric": False, "range": "mse"}, {"range": "percentile"}):
        codec = Affine(**settings)  # type: ignore[arg-type]
        state = codec.fit(x, Stats())
        assert codec.encode(x, state).decode().dtype == dtype == codec.simulate(x, state).dtype
        assert float((codec.simulate(x, state) - x).abs().max()) < 0.05


def test_straight_through_by_default() -> None:
    x = randn(4, 8).requires_grad_()
    codec = Affine(bits=3)
    (codec.simulate(x, codec.fit(x.detach(), Stats())) * randn(4, 8, seed=1)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, randn(4, 8, seed=1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_step_has_the_gradient_of_the_paper(symmetric: bool) -> None:
    x = randn(2, 50).requires_grad_()
    codec = Affine(bits=3, learn=True, range="percentile", percentile=80, symmetric=symmetric)
    state = codec.fit(x.detach(), Stats())
    assert [name for name, _ in state.named_parameters()] == ["scale"]
    slope = randn(2, 50, seed=1)
    out = codec.simulate(x, state)
    assert torch.allclose(out, codec.encode(x.detach(), state).decode(), atol=1e-6)
    (out * slope).sum().backward()
    s = state.scale.detach()[:, None].double()
    zero = 0 if symmetric else state.zero[:, None].double()
    low, high = (-3, 3) if symmetric else (0, 7)
    v = x.detach().double() / s + zero
    inside = (v > low) & (v < high)
    # Esser et al. 2020, eq. 3: round(v) - v inside, the bound outside; times 1 / sqrt(N Qp)
    step = torch.where(inside, v.round() - v, v.round().clamp(low, high) - zero)
    assert 0.1 < float((~inside).double().mean()) < 0.5
    torch.testing.assert_close(
        state.scale.grad.double(), (step * slope).sum(1) / math.sqrt(50 * high), rtol=1e-4, atol=1e-5
    )
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(inside, slope, 0))


def test_learning_the_step_lowers_the_error() -> None:
    x = randn(4, 200)
    codec = Affine(bits=2, learn=True)
    state = codec.fit(x, Stats())
    optimizer = torch.optim.Adam(state.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = (codec.simulate(x, state) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    with torch.no_grad():
        state.scale.neg_()
    assert float((codec.encode(x, state).decode() - x).square().mean()) == pytest.approx(losses[-1], rel=0.05)


def test_dynamic_activations() -> None:
    codec, x = Affine(), randn(5, 3, 16) * torch.tensor([1.0, 10, 100])[:, None]
    assert codec.needs_at("input") == () and not list(codec.fit(x.new_zeros(0), Stats()).buffers())
    low, high = x.min(), x.max()
    scale = (high - low) / 255
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, (-low / scale).round().int(), 0, 255)
    torch.testing.assert_close(codec.simulate(x, State()), theirs)
    token = Affine(per="token")
    each = torch.stack([codec.simulate(row, State()) for row in x.reshape(15, 16)]).reshape(x.shape)
    torch.testing.assert_close(token.simulate(x, State()), each)
    torch.testing.assert_close(token.encode(x, State()).decode(), each)
    assert 0 in codec.simulate(x.clamp_min(0), State())
    assert codec.simulate(x[:0], State()).shape == (0, 3, 16)


def test_static_activations() -> None:
    codec = Affine(dynamic=False, bits=4)
    assert codec.needs_at("output") == ("range",) and codec.needs_at("weight") == ()
    state = codec.fit(torch.zeros(0), Stats(gathered={"range": (torch.tensor(-1.0), torch.tensor(2.0))}))
    assert float(state.scale) == pytest.approx(0.2) and int(state.zero) == 5
    seen = codec.simulate(torch.tensor([-5.0, 0, 0.31, 9]), state)
    torch.testing.assert_close(seen, torch.tensor([-1.0, 0, 0.4, 2]))
    learned = Affine(learn=True).fit(torch.zeros(0), Stats(gathered={"range": (torch.tensor(0.0), torch.tensor(2.0))}))
    Affine(learn=True).simulate(randn(3, 4), learned).sum().backward()
    assert learned.scale.grad is not None


def test_what_is_never_negative_has_levels_from_0_up() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6)), randn(200, 6).relu()
    for kind in RANGES:
        codec = Affine(dynamic=False, bits=4, range=kind)
        (name,) = codec.needs_at("input")
        found = gather(model, {"0": [("input", name)]}, [x[:100], x[100:]])["0"]["input", name]
        state = codec.fit(torch.zeros(0), Stats(gathered={name: found}))
        assert int(state.zero) == 0 and state.zero.dtype == torch.int32, kind
        assert float(state.scale) <= float(x.max()) / 15 * (1.001 if kind != "lsq" else 2), kind
        assert float((codec.simulate(x, state) - x).square().mean()) < 0.02, kind


def test_features_have_their_own_range() -> None:
    layers = {"conv": (nn.Conv2d(3, 2, 1), randn(8, 3, 4, 4)), "linear": (nn.Linear(3, 2), randn(8, 5, 3))}
    for kind, (layer, x) in layers.items():
        x = x * torch.tensor([1.0, 10, 100]).reshape([3, 1, 1] if kind == "conv" else [3])
        codec = Affine(dynamic=False, per="channel", symmetric=True)
        (name,) = codec.needs_at("input")
        found = gather(nn.Sequential(layer), {"0": [("input", name)]}, [x[:4], x[4:]])["0"]["input", name]
        state = codec.fit(torch.zeros(0), Stats(gathered={name: found}))
        dim = 1 if kind == "conv" else 2
        scale = x.transpose(0, dim).flatten(1).abs().amax(1) / 127
        theirs = torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(3, dtype=torch.int32), dim, -127, 127)
        torch.testing.assert_close(codec.simulate(x, state), theirs)
        torch.testing.assert_close(codec.encode(x, state).decode(), theirs)
        learns = Affine(learn=True, per="channel", range="mse", bits=4)
        (name,) = learns.needs_at("input")
        found = gather(nn.Sequential(layer), {"0": [("input", name)]}, [x])["0"]["input", name]
        state = learns.fit(torch.zeros(0), Stats(gathered={name: found}))
        out = learns.simulate(x, state)
        torch.testing.assert_close(out, learns.encode(x, state).decode())
        out.sum().backward()
        assert state.scale.grad is not None and state.scale.grad.flatten().shape == (3,)


def test_learned_zero_has_the_gradient_of_the_paper() -> None:
    x = randn(4, 60).requires_grad_()
    codec = Affine(bits=3, learn=True, zero="learned", symmetric=False, per="tensor", range="percentile", percentile=80)
    state = codec.fit(x.detach(), Stats())
    assert [name for name, _ in state.named_parameters()] == ["scale", "offset"]
    slope = randn(4, 60, seed=1)
    out = codec.simulate(x, state)
    torch.testing.assert_close(out, codec.encode(x.detach(), state).decode())
    (out * slope).sum().backward()
    s, beta = state.scale.detach().double(), state.offset.detach().double()
    v = (x.detach().double() - beta) / s
    inside = (v > 0) & (v < 7)
    # Bhalgat et al. 2020, eq. 4 and 5: by s, round(v) - v inside, the bound outside; by beta, 0 inside, 1 outside
    by_s = torch.where(inside, v.round() - v, v.clamp(0, 7))
    gain = 1 / math.sqrt(240 * 7)
    torch.testing.assert_close(state.scale.grad.double(), (by_s * slope).sum() * gain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        state.offset.grad.double(), (slope * ~inside).sum().double() * gain, rtol=1e-4, atol=1e-5
    )
    assert x.grad is not None
    torch.testing.assert_close(x.grad, slope * inside)


def test_the_start_of_the_paper() -> None:
    x = randn(3, 50)
    state = Affine(bits=3, range="lsq", learn=True).fit(x, Stats())
    torch.testing.assert_close(state.scale.detach(), 2 * x.abs().mean(1) / math.sqrt(3))
    seen = randn(40, 50).relu()
    found = gather(nn.Sequential(nn.Linear(50, 2)), {"0": [("input", "histogram")]}, [seen])["0"]["input", "histogram"]
    state = Affine(bits=4, range="lsq", learn=True).fit(torch.zeros(0), Stats(gathered={"histogram": found}))
    assert state.scale.item() == pytest.approx(2 * float(seen.mean()) / math.sqrt(15), rel=1e-3) and state.zero == 0


def test_standardized_weights() -> None:
    model, x = nn.Sequential(nn.Linear(20, 8)), randn(16, 20)
    with torch.no_grad():
        model[0].weight.add_(0.3)
    first = model[0].weight.detach().clone()
    piece = {"quantize.affine": {"bits": 3, "standardize": True, "learn": True, "on": "0"}}
    with smelt.training(model, [piece], steps=3) as t:
        optimizer = torch.optim.SGD(t.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            t.step()
        latent = dict(t.named_parameters())["0.weight/"].detach().double()
        scale = dict(t.named_parameters())["0.weight/link0.scale"].detach().double()[:, None]
        inside = model(x).detach()
    # Li et al. 2020, eq. 10, times the first standard deviation
    normal = (latent - latent.mean()) / (latent.std(unbiased=False) + 1e-5) * first.double().std(unbiased=False)
    expected = (normal / scale).round().clamp(-3, 3) * scale
    torch.testing.assert_close(model[0].weight.detach().double(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(latent, first.double())
    torch.testing.assert_close(model(x), inside)


def test_refusals() -> None:
    for settings, words in (
        ({"bits": 17}, "outside 1..16"),
        ({"range": "entropy"}, "no choice 'entropy'"),
        ({"bist": 4}, "did you mean 'bits'"),
    ):
        with pytest.raises(RecipeError, match=words):
            make("quantize.affine", settings)
    with pytest.raises(RecipeError, match="per 'token' is for activations"):
        Affine(per="token").fit(randn(3, 4), Stats())
    with pytest.raises(RecipeError, match="per 'group' is for weights"):
        Affine(per="group").needs_at("input")
    with pytest.raises(RecipeError, match="range 'average' is for activations"):
        Affine(range="average").fit(randn(3, 4), Stats())
    for settings, words in (
        ({"per": "channel"}, "per 'channel' is found from calibration data"),
        ({"range": "average"}, "range 'average' is found from calibration data"),
        ({"per": "token", "dynamic": False}, "known at run time only"),
        ({"standardize": True}, "standardize is for weights"),
        ({"zero": "learned"}, "goes with learn: true"),
        ({"zero": "learned", "learn": True, "symmetric": True}, "and asymmetric levels"),
    ):
        with pytest.raises(RecipeError, match=words):
            make("quantize.affine", settings).needs_at("input")
    with pytest.raises(RecipeError, match="dynamic activations take tensor or token"):
        Affine(per="channel").simulate(randn(3, 4), State())
    with pytest.raises(RuleError, match="acts inside train"):
        Affine(standardize=True).fit(randn(3, 4), Stats())
    with pytest.raises(RuleError, match="zeros of a pruned tensor"):
        Affine(standardize=True).fit(randn(3, 4), Stats(randn(3, 4) > 0, inside=Inside()))
    with pytest.raises(RuleError, match="no range was gathered"):
        Affine(dynamic=False).fit(torch.zeros(0), Stats())
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = {t.name: t for t in targets(model)}
    assert "no" in str(Affine(axis=2).refuses(found["0.weight"])) and Affine(axis=2).refuses(found["0.bias"]) is None
    assert "int64" in str(Affine().refuses(found["1.num_batches_tracked"]))


def test_in_a_recipe(model: nn.Sequential, job: smelt.Job) -> None:
    steps = [{"quantize.affine": {"bits": 6, "range": "mse"}}, {"quantize.affine": {"at": "input", "dynamic": False}}]
    result = smelt.compress(model, steps, job)
    assert result.report.value("accuracy") > result.report.value("accuracy", 0) - 0.02


def test_a_group_longer_than_the_row_is_the_row() -> None:
    x = randn(4, 6)
    most, row = (encode(x, per="group", group=group, bits=4) for group in (1 << 31, 6))
    assert torch.equal(most.decode(), row.decode()) and most.parts["scale"].shape == (4, 1)
