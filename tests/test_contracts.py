"""What holds for every file on a shelf, on the day it appears."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smelt
from smelt.core import shelf
from smelt.core.choice import WORDS
from smelt.core.encoded import Form
from smelt.core.errors import RecipeError, SmeltError
from smelt.core.method import (
    CARD_LINES,
    Codec,
    Composite,
    Method,
    Objective,
    Rewrite,
    State,
    Stats,
    make,
)
from smelt.core.recipe import Recipe
from smelt.core.statistic import Statistic, of_weights
from smelt.core.store import check_fresh, pack, store_of
from smelt.core.target import Target, targets

METHODS = shelf.names("methods")
CODECS = [n for n in METHODS if issubclass(shelf.load("methods", n, Method), Codec)]
LOSSY = [n for n in CODECS if not shelf.load("methods", n, Method).lossless]
LOSSLESS = [n for n in CODECS if n not in LOSSY]
REWRITES = [n for n in METHODS if issubclass(shelf.load("methods", n, Method), Rewrite)]
OBJECTIVES = [n for n in METHODS if issubclass(shelf.load("methods", n, Method), Objective)]
COMPOSITES = [n for n in METHODS if issubclass(shelf.load("methods", n, Method), Composite)]
SHAPES = [(12, 10), (8, 3, 3, 3), (6, 4, 5), (7,), (1, 1), (300, 40)]


def net() -> nn.Sequential:
    """One of each: convolution, transposed, grouped, norm, linear, embedding-like, tied below."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 12 * 12, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).eval()


INPUT = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(5))
BATCHES = [(INPUT, torch.zeros(3, dtype=torch.int64))]


def target_of(shape: tuple[int, ...]) -> Target:
    """A weight of this shape in a layer (a bias, if it has one dimension)."""
    if len(shape) < 3:
        layer: nn.Module = nn.Linear(shape[-1], shape[0])
        return targets(layer)[0 if len(shape) == 2 else 1]
    return targets((nn.Conv1d if len(shape) == 3 else nn.Conv2d)(shape[1], shape[0], shape[2:]))[0]


def known_of(codec: Codec, target: Target) -> dict[str, Any]:
    """What the codec asks to know of a weight, from random inputs of its layer."""
    shape = target.tensor.shape
    inputs = torch.randn(64, shape[1] if len(shape) > 1 else shape[0], *[6] * (len(shape) - 2))
    batches = [(inputs, torch.zeros(64))] if codec.needs_at("weight") else []
    return of_weights(target.module, [target], codec.needs_at("weight"), batches, lambda y, _: y.square().mean())[
        target.name
    ]


def job_of(name: str) -> smelt.Job:
    """With data for rewrites, composites and codecs that ask for statistics."""
    method = make(name)
    asks = isinstance(method, (Rewrite, Composite)) or (isinstance(method, Codec) and bool(method.needs_at("weight")))
    return smelt.Job(data=smelt.Data(train=BATCHES), latency=False) if asks else smelt.Job()


def test_every_method_has_one_kind() -> None:
    assert sorted(LOSSY + LOSSLESS + REWRITES + OBJECTIVES + COMPOSITES) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_settings_have_defaults_documentation_and_checks(name: str) -> None:
    method = make(name)
    assert method.name == name
    assert hash(method) == hash(make(name)) and method == make(name)
    for f in fields(method):
        assert f.default is not MISSING and f.metadata["doc"]
        assert f.name not in ("on", "at", "with") and not (name in CODECS + COMPOSITES and f.name in WORDS)
    with pytest.raises(RecipeError, match="has no setting 'nonsense'"):
        make(name, {"nonsense": 1})
    for f in fields(method):
        with pytest.raises(RecipeError):
            make(name, {f.name: object()})


@pytest.mark.parametrize("name", METHODS)
def test_cards_are_complete(name: str) -> None:
    card = shelf.load("methods", name, Method).card()
    assert all(card[line] for line in ("does", *CARD_LINES)), [k for k, v in card.items() if not v]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_round_trip(name: str, shape: tuple[int, ...]) -> None:
    codec, target = make(name), target_of(shape)
    if reason := codec.refuses(target):
        assert len(reason) > 10
        return
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    untouched = x.clone()
    stats = Stats(gathered=known_of(codec, target), seed=3)
    state = codec.fit(x, stats)
    encoded = codec.encode(x, state)
    assert torch.equal(x, untouched)
    y = encoded.decode()
    assert y.shape == x.shape and y.dtype == x.dtype and bool(torch.isfinite(y).all())
    assert torch.equal(y, codec.encode(x, codec.fit(x, stats)).decode())
    assert float((x - y).norm() / x.norm()) < 0.9
    slope = x.clone().requires_grad_()
    out = codec.simulate(slope, state)
    out.sum().backward()
    assert torch.allclose(out.detach(), y, atol=1e-5)
    assert slope.grad is not None


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_leave_masked_entries_out(name: str) -> None:
    codec = make(name)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    where = x.abs() > 0.5
    loud = torch.where(where, x, torch.full_like(x, 1e6))
    quiet = torch.where(where, x, torch.zeros_like(x))
    stats = Stats(where, known_of(codec, target_of((16, 8))))
    decoded = [codec.encode(t, codec.fit(t, stats)).decode()[where] for t in (loud, quiet)]
    assert torch.equal(*decoded)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool, torch.int64]
)
def test_lossless_round_trip(name: str, dtype: torch.dtype) -> None:
    codec = make(name)
    for shape in [*SHAPES, (), (0,), (3, 0)]:
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
        y = codec.encode(x, State()).decode()
        assert y.dtype == dtype and y.shape == x.shape
        assert torch.equal(
            x.reshape(-1).view(torch.uint8) if dtype is not torch.bool else x,
            y.reshape(-1).view(torch.uint8) if dtype is not torch.bool else y,
        )


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_codecs_decline_where_they_do_not_shrink(name: str) -> None:
    noise = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    assert pack(noise, [make(name)]) is noise
    assert pack(torch.zeros(4096, dtype=torch.uint8), [make(name)]) is not noise


@pytest.mark.parametrize("name", LOSSY + REWRITES + COMPOSITES)
def test_a_step_is_stored_saved_loaded_and_trained(name: str, tmp_path: Path) -> None:
    model = net()
    result = smelt.compress(model, [{name: {}}], job_of(name))
    path = tmp_path / "model.smelt"
    assert result.save(path) == path.stat().st_size
    loaded = smelt.load(path, into=net())
    assert torch.equal(loaded(INPUT), result.model(INPUT))
    assert {n: e.encoded.nbytes() for n, e in store_of(loaded).entries.items()} == {
        n: e.encoded.nbytes() for n, e in store_of(result.model).entries.items()
    }
    before = {n: p.clone() for n, p in loaded.named_parameters()}
    with smelt.training(loaded, steps=3) as t:
        optimizer = torch.optim.SGD(t.parameters(), 1e-5)
        for _ in range(3):
            optimizer.zero_grad()
            loaded(INPUT).pow(2).mean().backward()
            optimizer.step()
            t.step()
    check_fresh(loaded)
    assert any(not torch.equal(before[n], p) for n, p in loaded.named_parameters())
    assert smelt.save(loaded, tmp_path / "again.smelt") > 0


@pytest.mark.parametrize("name", LOSSY)
def test_a_codec_acts_inside_train(name: str) -> None:
    model = net()
    with smelt.training(model, [{name: {}}], steps=4, calibration=BATCHES) as t:
        optimizer = torch.optim.SGD(t.parameters(), 0.01)
        for _ in range(4):
            optimizer.zero_grad()
            model(INPUT).pow(2).mean().backward()
            optimizer.step()
            t.step()
        inside = model.eval()(INPUT).detach()
    assert store_of(model).entries
    assert torch.allclose(model(INPUT), inside, atol=5e-3)  # scales and codebooks are fitted once more at the end


@pytest.mark.parametrize("name", [n for n in LOSSY if "input" in shelf.load("methods", n, Method).places])
def test_a_codec_acts_on_activations(name: str, tmp_path: Path) -> None:
    model = net()
    data = smelt.Data(train=[(INPUT, torch.zeros(3, dtype=torch.int64))])
    result = smelt.compress(model, [{name: {"at": "input", "on": "11"}}], smelt.Job(data=data, latency=False))
    assert any("simulated" in note for note in result.report.notes)
    result.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=net())
    assert torch.equal(loaded(INPUT), result.model(INPUT))
    assert not torch.equal(loaded(INPUT), model(INPUT))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_give_a_scalar_with_a_gradient(name: str) -> None:
    model, teacher = net(), net()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.5)
    with smelt.training(model, [{name: {}}], teacher=teacher, calibration=BATCHES) as t:
        loss = t.loss(INPUT, model(INPUT), torch.zeros(3, dtype=torch.int64))
        loss.backward()
        slopes = [p.grad for p in t.parameters() if p.grad is not None]
        assert loss.dim() == 0 and any(bool((slope != 0).any()) for slope in slopes)


@pytest.mark.parametrize("name", METHODS)
def test_plain_and_back(name: str) -> None:
    step = {"train": {"with": [name]}} if name in OBJECTIVES else name
    recipe = Recipe.of({"steps": [step]})
    assert Recipe.of(recipe.to_yaml()).to_plain() == recipe.to_plain()


@pytest.mark.parametrize("name", shelf.names("forms"))
def test_forms_have_defaults_and_say_what_carries_the_values(name: str) -> None:
    form = shelf.load("forms", name, Form)()
    assert form.name == name and form.values
    with pytest.raises(SmeltError):
        form.check({}, torch.Size([3]), torch.float32)


@pytest.mark.parametrize("name", shelf.names("scores"))
def test_scores_keep_the_shape(name: str) -> None:
    x, score = torch.randn(4, 5), shelf.module("scores", name)
    if not hasattr(score, "score"):  # of whole units, not of weights
        assert callable(score.units)
        return
    assert score.score(x, dict.fromkeys(score.NEEDS, torch.rand(5)), torch.Generator()).shape == x.shape


@pytest.mark.parametrize("name", shelf.names("statistics"))
def test_statistics_are_gathered_from_linear_layers(name: str) -> None:
    statistic = shelf.load("statistics", name, Statistic)(nn.Linear(4, 2))
    statistic.update(torch.randn(8, 4))
    assert statistic.result() is not None


@pytest.mark.parametrize("name", shelf.names("data"))
def test_embedded_data_repeat_and_hold_out_a_test_split(name: str) -> None:
    first, again = (shelf.module("data", name).load(seed=1) for _ in range(2))
    assert first.fingerprint == again.fingerprint != shelf.module("data", name).load(seed=2).fingerprint
    assert {"train", "test"} <= set(first.splits())


@pytest.mark.parametrize("name", [n for n in shelf.names("measures") if n != "accuracy"])
def test_measures_have_a_unit(name: str) -> None:
    assert isinstance(shelf.module("measures", name).UNIT, str)


@pytest.mark.parametrize("name", shelf.names("models"))
def test_builders_build_from_defaults(name: str) -> None:
    arguments = {"chain": {"layers": ["ReLU"]}}.get(name, {})
    with torch.device("meta"):  # as loading does
        assert isinstance(shelf.module("models", name).build(**arguments), nn.Module)
