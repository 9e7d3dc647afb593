"""quantize.adaround against all roundings of small layers, the paper's formulas by autograd, and what it must beat."""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.errors import DataError, RuleError
from smelt.core.method import Inside, Stats, make
from smelt.core.store import store_of
from smelt.core.target import targets
from smelt.methods.quantize import adaround
from smelt.methods.quantize.adaround import AdaRound
from smelt.statistics.gram import Gram, damped


def correlated(n: int, k: int, seed: int = 0) -> Tensor:
    """Inputs of mostly three causes, [n, k]."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(n, 3, generator=generator) @ torch.randn(3, k, generator=generator)
    return causes + 0.3 * torch.randn(n, k, generator=generator)


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(layer: nn.Module, x: Tensor) -> Tensor:
    statistic = Gram(layer)
    statistic.update(x)
    return statistic.result()


def errors(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    d = (q - w).double()
    return ((d @ h) * d).sum(1)


def test_it_finds_the_best_of_all_roundings_of_a_small_layer() -> None:
    k, w = 7, weights(12, 7)
    gram = gram_of(nn.Linear(k, 1), correlated(200, k))
    h, method = damped(gram[0], 0.01), AdaRound(bits=2, per="channel")
    state = method.fit(w, Stats(gathered={"gram": gram}))
    low, step = state.get_buffer("low"), state.get_buffer("step")
    every = torch.tensor(list(product((0.0, 1.0), repeat=k)))
    best = torch.stack([errors(w, low + ups * step, h) for ups in every]).amin(0)
    nearest = errors(w, torch.where(w - low >= step / 2, low + step, low), h)
    found = errors(w, method.encode(w, state).decode(), h)
    assert bool((found < 0.8 * nearest).any()) and bool((found <= nearest * (1 + 1e-6)).all())
    assert int((found <= best * (1 + 1e-5)).sum()) >= 8 and float(found.sum()) < 1.2 * float(best.sum())


@pytest.mark.parametrize("settings", [{"steps": 0}, {"polish": False, "steps": 200}, {"symmetric": True, "bits": 3}])
def test_no_row_ends_above_the_nearest_levels(settings: dict[str, object]) -> None:
    gram = gram_of(nn.Linear(24, 1), correlated(100, 24))
    w = weights(16, 24)
    method = AdaRound(**{"group": 8, "steps": 50, **settings})  # type: ignore[arg-type]
    state = method.fit(w, Stats(gathered={"gram": gram}))
    low, step, h = state.get_buffer("low"), state.get_buffer("step"), damped(gram[0], 0.01)
    nearest = errors(w, torch.where(w - low >= step / 2, low + step, low), h)
    found = errors(w, method.encode(w, state).decode(), h)
    assert bool((found <= nearest * (1 + 1e-6)).all()) and float(found.sum()) < 0.8 * float(nearest.sum())


def test_learning_is_the_papers_by_autograd() -> None:
    k, w = 6, weights(2, 4, 6)
    h = torch.stack([gram_of(nn.Linear(k, 1), correlated(50, k, seed))[0] for seed in (0, 1)])
    step = torch.full_like(w, 0.3)
    task = adaround._Task((w / step).floor() * step - w, step, h)
    start = torch.logit(((w / step) % 1 + 0.1) / 1.2) + weights(2, 4, 6, seed=2)
    v = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([v], adaround.RATE)
    steps = 40
    for t in range(1, steps + 1):
        soft = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
        d = (w / step).floor() * step + soft * step - w
        size = (0.09 * h.diagonal(dim1=1, dim2=2)).mean(1)[:, None, None]
        loss = ((d @ h.float()) * d / size).sum()
        loss = loss + adaround.STRENGTH * (1 - (2 * soft - 1).abs() ** (20 - 18 * t / steps)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(task.learn(start, steps), v.detach(), rtol=1e-3, atol=1e-3)


def test_a_convolution_is_a_linear_layer_on_its_patches() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    x = torch.randn(5, 4, 6, 6)
    method, gram = AdaRound(bits=3, steps=50, group=9), gram_of(conv, x)
    w = conv.weight.detach()
    found = method.encode(w, method.fit(w, Stats(gathered={"gram": gram}))).decode()
    for g in (0, 1):
        own = w[3 * g : 3 * g + 3].reshape(3, -1)
        patches = nn.functional.unfold(x[:, 2 * g : 2 * g + 2], 3, padding=1).transpose(1, 2).reshape(-1, 18)
        linear = gram_of(nn.Linear(18, 3), patches)
        alone = method.encode(own, method.fit(own, Stats(gathered={"gram": linear}))).decode()
        torch.testing.assert_close(found[3 * g : 3 * g + 3].reshape(3, -1), alone)


def test_pruned_weights_stay_zero_and_do_not_count() -> None:
    w, gram = weights(8, 16), gram_of(nn.Linear(16, 1), correlated(100, 16))
    where = w.abs() > 0.4
    method = AdaRound(per="channel", steps=50)
    state = method.fit(w, Stats(where, {"gram": gram}))
    chosen = state.get_buffer("low") + (state.get_parameter("v") >= 0) * state.get_buffer("step")
    assert bool((chosen[~where] == 0).all())
    loud = method.fit(w.masked_fill(~where, 100.0), Stats(where, {"gram": gram}))
    assert all(torch.equal(a, b) for a, b in zip(state.state_dict().values(), loud.state_dict().values(), strict=True))


def test_what_has_no_such_moments_is_refused() -> None:
    for layer, reason in ((nn.ConvTranspose2d(2, 2, 2), "transposed"), (nn.Embedding(4, 4), "Embedding")):
        assert reason in str(AdaRound().refuses(targets(layer)[0]))
    with pytest.raises(RuleError, match="needs the second moments"):
        AdaRound().fit(weights(4, 4), Stats())
    with pytest.raises(DataError, match="needs data"):
        smelt.compress(nn.Sequential(nn.Linear(4, 4)), [{"quantize.adaround": {}}], smelt.Job())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 4))


INPUTS = correlated(64, 16, 3).reshape(64, 2, 8)


def job() -> smelt.Job:
    return smelt.Job(data=smelt.Data(train=[(INPUTS, None)]), latency=False)


def test_a_file_holds_what_was_chosen(tmp_path: Path) -> None:
    result = smelt.compress(net(), [{"quantize.adaround": {"bits": 3, "steps": 30, "group": 16}}], job())
    size = result.save(tmp_path / "model.smelt")
    loaded = smelt.load(tmp_path / "model.smelt", into=net())
    weight = result.model.get_parameter("3.weight")
    assert torch.equal(loaded.get_parameter("3.weight"), weight) and size < 6000
    assert len(weight[0, :16].unique()) <= 8
    assert len(store_of(loaded).entries) == 3


def test_it_is_simulated_and_softened_as_it_says() -> None:
    w, gram = weights(4, 8), gram_of(nn.Linear(8, 1), correlated(100, 8))
    soft = AdaRound(per="channel", soft=1.0)
    inside = soft.fit(w, Stats(gathered={"gram": gram}, inside=Inside()))
    scale = inside.get_buffer("scale")[:, None]
    torch.testing.assert_close(soft.simulate(w, inside).detach(), w, rtol=0, atol=float(scale.max()))
    low = inside.get_buffer("low")
    within = (w >= low) & (w <= low + scale)
    torch.testing.assert_close(soft.simulate(w, inside).detach()[within], w[within], rtol=1e-4, atol=1e-4)
    assert soft.fit(w, Stats(gathered={"gram": gram}, inside=Inside(0.5, inside))) is inside
    hard = AdaRound(per="channel")
    assert torch.equal(hard.simulate(w, inside).detach(), hard.encode(w, inside).decode())
    hard.simulate(w, inside).sum().backward()
    slope = inside.get_parameter("v").grad
    assert slope is not None and bool(slope.all())


@pytest.mark.parametrize("soft", [0.0, smelt.Ramp(1, 0)])
def test_inside_train_the_choices_follow_the_whole_model(soft: object) -> None:
    wanted = net()(INPUTS).detach()
    settings = {"bits": 2, "per": "channel", "steps": 20, "original": False}
    alone = smelt.compress(net(), [make("quantize.adaround", settings)], job()).model(INPUTS).detach()
    model, steps = net(), 150
    piece = make("quantize.adaround", {**settings, "soft": soft})
    with smelt.training(model, [piece], steps=steps, calibration=[(INPUTS, None)]) as t:
        rounding = [p for name, p in t.named_parameters() if name.endswith(".v")]
        assert len(rounding) == 3
        optimizer = torch.optim.Adam(rounding)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
            loss = (model(INPUTS) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            t.step()
        last = model(INPUTS).detach()
    torch.testing.assert_close(model(INPUTS).detach(), last, rtol=0, atol=1e-5)
    assert len(model.get_parameter("3.weight")[0].unique()) <= 4
    assert float((last - wanted).square().mean()) < 0.7 * float((alone - wanted).square().mean())
