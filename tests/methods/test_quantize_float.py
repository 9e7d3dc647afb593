"""quantize.float against torch's own casts, the published NF4, the rules of OCP MX by hand; stored, loaded, trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.encoded import Encoded
from smelt.core.errors import ModelError, RecipeError, RuleError
from smelt.core.method import Stats, make
from smelt.core.store import check_fresh, store_of
from smelt.core.target import check_finite, targets
from smelt.forms.levels import Levels
from smelt.grids.levels import Rounder
from smelt.methods.quantize.float import Float

BYTE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FORMATS = ["fp16", "bf16", "e4m3", "e5m2", "e3m2", "e2m3", "fp4", "nf", "mxfp8", "mxfp6", "mxfp4"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encode(x: Tensor, where: Tensor | None = None, **settings: Any) -> Encoded:
    codec = Float(**settings)
    return codec.encode(x, codec.fit(x, Stats(where)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(20, 12), nn.Flatten(), nn.Linear(48, 32), nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 6, 3, groups=2),
        nn.ReLU(), nn.ConvTranspose2d(6, 3, 2), nn.Flatten(), nn.Linear(27, 5),
    ).eval()  # fmt: skip


TOKENS = torch.arange(24).reshape(6, 4) % 20


def relative(y: Tensor, x: Tensor) -> float:
    return float((y - x).detach().norm() / x.detach().norm())


@pytest.mark.parametrize("name", BYTE)
def test_fp8_is_torchs_cast_of_what_is_scaled(name: str) -> None:
    x, dtype = randn(6, 40) * 10, BYTE[name]
    most = torch.finfo(dtype).max
    scale = x.abs().amax(1, keepdim=True) / most
    tree = encode(x, format=name)
    assert torch.equal(tree.decode(), (x / scale).clamp(-most, most).to(dtype).float() * scale)
    assert tree.parts["values"].dtype == dtype and tree.parts["scale"].shape == (6,)
    assert torch.equal(encode(x, format=name, per="none").decode(), x.to(dtype).float())
    loud = torch.tensor([[1e30, -1e30, 0.0, 1.0]])
    assert encode(loud, format=name, per="none").decode().tolist() == [[most, -most, 0, 1]]


@pytest.mark.parametrize(("name", "exponent"), [("e4m3", 4), ("e5m2", 5)])
def test_the_rounding_of_small_floats_is_that_of_torch(name: str, exponent: int) -> None:
    """Ties to even, subnormal numbers; every number of 8 bits and the middle between it and the next."""
    numbers = torch.arange(128).byte().view(BYTE[name]).float()
    numbers = numbers[torch.isfinite(numbers)]
    x = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2, randn(500) * 50))
    x = torch.cat((x, -x))
    assert torch.equal(Rounder(Levels("float", 8, exponent))(x), x.to(BYTE[name]).float())


def test_half_precision_is_a_cast() -> None:
    x = randn(7, 5)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        tree = encode(x, format=name)
        assert tree.parts["values"].dtype == dtype and torch.equal(tree.decode(), x.to(dtype).float())
        layer = nn.Linear(4, 4).to(dtype)
        assert "already" in str(Float(format=name).refuses(targets(layer)[0]))


def test_nf4_as_published() -> None:
    """Absmax of blocks of 64, then the nearest of the sixteen values."""
    x = randn(4, 130)
    table = Levels("normal", 4).table()
    tree = encode(x, format="nf")
    expected = torch.empty_like(x)
    for begin in (0, 64, 128):
        block = x[:, begin : begin + 64]
        top = block.abs().amax(1, keepdim=True)
        expected[:, begin : begin + 64] = table[(block / top)[..., None].sub(table).abs().argmin(-1)] * top
    assert torch.equal(tree.decode(), expected)
    assert tree.parts["scale"].shape == (4, 3)


def test_scales_that_are_stored_in_few_bits() -> None:
    x = randn(64, 640)
    plain, double, byte = (encode(x, format="nf", scales=s) for s in ("float32", "double", "e4m3"))
    side = double.parts["scale"]
    assert isinstance(side, Encoded) and side.parts["codes"].dtype == torch.uint8
    assert side.parts["scale"].shape == (3,)  # 640 scales, 256 each
    exact = plain.parts["scale"]
    for begin in range(0, 640, 256):
        own, part = side.decode().reshape(-1)[begin : begin + 256], exact.reshape(-1)[begin : begin + 256]  # type: ignore[union-attr]
        assert float((own - part).abs().max()) <= float(part.max() - part.min()) / 255 * 0.51
    assert double.nbytes() < plain.nbytes() - 3 * 640 + 100
    side = byte.parts["scale"]
    assert isinstance(side, Encoded) and side.parts["scale"].shape == ()
    assert side.parts["values"].dtype == torch.float8_e4m3fn and relative(side.decode(), exact) < 0.05  # type: ignore[arg-type]
    for tree in (double, byte):
        assert relative(tree.decode(), x) < relative(plain.decode(), x) * 1.05


def test_blocks_by_hand() -> None:
    """OCP MX 1.0, section 6.3: 2^(floor(log2 max) - exponent of the element's largest number)."""
    x = torch.zeros(2, 40)
    x[0, :6] = torch.tensor([9.0, -3.0, 1.0, 0.9, 0.5, 0.2])  # floor(log2 9) - 2 = 1: steps of 2 * e2m1
    x[0, 32:35] = torch.tensor([7.9, 0.4, -0.2])  # 2 - 2 = 0; 7.9 saturates at 6
    x[1, 0] = 2.0**-10
    tree = encode(x, format="mxfp4")
    side = tree.parts["scale"]
    assert isinstance(side, Encoded)
    assert dict(side.leaves())["exponents"].tolist() == [[1, 0], [-12, -127]]
    expected = torch.zeros(2, 40)
    # 4.5 -> 4, -1.5, 0.5, 0.45 -> 0.5, 0.25 is a tie -> 0 (even), 0.1 -> 0
    expected[0, :6] = torch.tensor([8.0, -3.0, 1.0, 1.0, 0.0, 0.0])
    expected[0, 32:35] = torch.tensor([6.0, 0.5, 0.0])  # -0.2 -> 0
    expected[1, 0] = 2.0**-10
    assert torch.equal(tree.decode(), expected)


@pytest.mark.parametrize(("name", "largest"), [("mxfp8", 448), ("mxfp6", 7.5), ("mxfp4", 6)])
def test_blocks_by_the_formula(name: str, largest: float) -> None:
    x = randn(5, 64) * torch.tensor([1e-3, 1, 1e3, 1e9, 1e-30])[:, None]
    exponent = torch.floor(torch.log2(x.double().reshape(5, 2, 32).abs().amax(-1)))
    shift = torch.floor(torch.log2(torch.tensor(largest, dtype=torch.float64)))
    found = encode(x, format=name).parts["scale"]
    assert isinstance(found, Encoded)
    assert torch.equal(found.parts["exponents"].double(), exponent - shift)  # type: ignore[union-attr]
    assert relative(encode(x, format=name, range="mse").decode(), x) <= relative(encode(x, format=name).decode(), x)


def test_elements_of_blocks() -> None:
    x = randn(4, 64)
    assert encode(x, format="mxfp8", element="e5m2").parts["values"].dtype == torch.float8_e5m2
    inner = encode(x, format="mxfp6", element="e3m2").parts["values"]
    assert isinstance(inner, Encoded) and inner.form == Levels("float", 6, 3)


@pytest.mark.parametrize("name", ["e4m3", "e3m2", "fp4", "nf"])
@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
def test_the_least_error_is_no_worse(name: str, per: str) -> None:
    x = randn(8, 3, 5, 5)
    errors = [relative(encode(x, format=name, per=per, range=r).decode(), x) for r in ("minmax", "mse")]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_format_in_every_shape(name: str, dtype: torch.dtype) -> None:
    for shape in ((12, 10), (8, 3, 3, 3), (7,), (1, 1), (6, 4, 5)):
        x = randn(*shape).to(dtype)
        codec = Float(format=name)
        state = codec.fit(x, Stats())
        tree = codec.encode(x, state)
        tree.form.check({k: (p.shape, p.dtype) for k, p in tree.parts.items()}, tree.shape, tree.dtype)
        assert tree.decode().dtype == dtype and relative(tree.decode().float(), x.float()) < 0.2
        assert torch.equal(codec.simulate(x, state), tree.decode())
        zeros = encode(torch.zeros(shape, dtype=dtype), format=name).decode()
        assert bool((zeros == 0).all())


@pytest.mark.parametrize("name", FORMATS[2:])
@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_masked_entries_do_not_count(name: str, range_: str) -> None:
    x, where = randn(6, 40), randn(6, 40, seed=1) > 0
    where[2] = False
    quiet, loud = (encode(torch.where(where, x, f), where, format=name, range=range_).decode() for f in (0.0, 1e6))
    assert torch.equal(quiet[where], loud[where]) and bool((quiet[~where] == 0).all())


@pytest.mark.parametrize("name", FORMATS)
def test_stored_pruned_loaded_and_trained(name: str, tmp_path: Path) -> None:
    recipe = [{"prune.weights": {"ratio": 0.5}}, {"quantize.float": {"format": name}}, {"code.entropy": {}}]
    result = smelt.compress(net(), recipe)
    assert len(store_of(result.model).entries) == 5
    result.save(tmp_path / "x.smelt")
    loaded = smelt.load(tmp_path / "x.smelt", into=net())
    assert torch.equal(loaded(TOKENS), result.model(TOKENS))
    dense = {n: bool((p != 0).float().mean() < 0.52) for n, p in loaded.named_parameters() if p.dim() > 1}
    assert all(dense.values()), dense
    before = loaded.get_parameter("2.weight").detach().clone()
    with smelt.training(loaded, steps=4) as t:
        optimizer = torch.optim.SGD(t.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loaded(TOKENS).square().mean().backward()
            optimizer.step()
            t.step()
        inside = loaded(TOKENS).detach()
    check_fresh(loaded)
    fixed = {"mxfp8", "mxfp6", "mxfp4"}  # no float is left to learn, or only numbers too far apart
    assert torch.equal(loaded.get_parameter("2.weight"), before) == (name in fixed)
    assert relative(loaded.get_parameter("2.weight"), before) < 0.5
    if name not in ("fp16", "bf16"):  # fp8 is seen rounded, so that what trained is what is stored
        assert torch.allclose(loaded(TOKENS), inside, atol=1e-6)
    assert smelt.save(loaded, tmp_path / "again.smelt") > 0
    again = smelt.load(tmp_path / "again.smelt", into=net())
    assert torch.equal(again(TOKENS), loaded(TOKENS))


@pytest.mark.parametrize("scales", ["float16", "double", "e4m3"])
def test_stored_scales_train(scales: str) -> None:
    model = smelt.compress(net(), [{"quantize.float": {"format": "nf", "group": 8, "scales": scales}}]).model
    before = model.get_parameter("2.weight").detach().clone()
    losses = []
    with smelt.training(model, steps=20) as t:
        optimizer = torch.optim.Adam(t.parameters(), 1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(TOKENS).square().mean()
            loss.backward()
            optimizer.step()
            t.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0] and 0 < relative(model.get_parameter("2.weight"), before) < 0.5


def test_a_trained_fp8_weight_saturates() -> None:
    model = nn.Linear(3, 2, bias=False)
    result = smelt.compress(model, [{"quantize.float": {"per": "none"}}])
    with smelt.training(result.model) as t:
        for leaf in t.parameters():
            leaf.data.fill_(1e4)
    assert bool((result.model.get_parameter("weight") == 448).all())


def test_another_codec_cannot_eat_fp8() -> None:
    with pytest.raises(RuleError, match="no floating values left"):
        smelt.compress(net(), [{"quantize.float": {}}, {"share.kmeans": {"clusters": 4}}])


def test_fp8_files_are_as_small_as_bytes(tmp_path: Path) -> None:
    model = nn.Linear(256, 256, bias=False)
    sizes: list[int] = []
    recipes: list[list[dict[str, Any]]] = [[{"quantize.float": {}}], [{"quantize.float": {}}, {"code.entropy": {}}]]
    for recipe in recipes:
        sizes.append(smelt.compress(model, recipe).save(tmp_path / f"{len(sizes)}.smelt"))
    assert sizes[0] < 256 * 256 and sizes[1] < 0.9 * 256 * 256


def test_models_of_fp8_are_checked_for_nan() -> None:
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match="1 NaN or infinite"):
        check_finite(targets(model))


@pytest.mark.parametrize(
    "settings", [{}, {"per": "token"}, {"format": "mxfp4"}, {"format": "nf"}, {"format": "bf16"}, {"dynamic": False}]
)
def test_activations(settings: dict[str, Any], tmp_path: Path) -> None:
    data = smelt.Data(train=[(TOKENS, torch.zeros(6, dtype=torch.int64))])
    step = {"quantize.float": {"at": "input", "on": ["2", "4"], **settings}}
    result = smelt.compress(net(), [step], smelt.Job(data=data, latency=False))
    result.save(tmp_path / "x.smelt")
    loaded = smelt.load(tmp_path / "x.smelt", into=net())
    exact = net()(TOKENS)
    assert torch.equal(loaded(TOKENS), result.model(TOKENS)) and not torch.equal(loaded(TOKENS), exact)
    assert relative(loaded(TOKENS), exact) < 0.2


def test_activations_by_hand() -> None:
    x = randn(2, 3, 5, 40)
    scale = x.abs().amax(-1, keepdim=True) / 448
    codec = Float(per="token")
    assert torch.equal(codec.simulate(x, make("quantize.float").fit(x.new_zeros(0), Stats())), (x / scale).to(BYTE["e4m3"]).float() * scale)  # noqa: E501  # fmt: skip
    blocks = Float(format="mxfp4")
    rows = blocks.encode(x.reshape(-1, 40), blocks.fit(x.reshape(-1, 40), Stats())).decode()
    assert torch.equal(blocks.simulate(x, codec.fit(x.new_zeros(0), Stats())), rows.reshape(x.shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "nf4"}, "no choice 'nf4'"),
        ({"format": "mxfp4", "element": "e4m3"}, "mxfp4 is not made of e4m3"),
        ({"format": "mxfp8", "per": "tensor"}, "its own blocks"),
        ({"format": "bf16", "per": "channel"}, "has no scale"),
        ({"bits": 9}, "outside 2..8"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make("quantize.float", settings)


def test_what_cannot_be_known_is_refused() -> None:
    for settings, message in (
        ({"per": "channel"}, "per 'channel' is for weights"),
        ({"dynamic": False, "range": "mse"}, "range: mse at input"),
        ({"dynamic": False, "format": "mxfp4"}, "per: group at input"),
    ):
        with pytest.raises(RecipeError, match=message):
            Float(**settings).needs_at("input")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="per 'token' is for activations"):
        Float(per="token").fit(randn(3, 3), Stats())
    with pytest.raises(RuleError, match="no range was gathered"):
        Float(dynamic=False).fit(torch.zeros(0), Stats())
    assert "none is axis 2" in str(Float(axis=2).refuses(targets(nn.Linear(3, 3))[0]))
