"""Options of the loop: schedules, accumulation, averages, batch norms, mixing, logs."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import smelt
from smelt.core.data import Batches, Data, Guided
from smelt.core.errors import DataError, OutputError, RecipeError
from smelt.core.recipe import Recipe, Step
from smelt.core.train import Train
from smelt.train.average import Average, renew_norms
from smelt.train.loop import Loop, fit, task_loss
from smelt.train.mixing import mixed
from smelt.train.rates import momentum, optimizer_of, rate, set_rates
from tests.conftest import mlp


def step(**settings: object) -> Step:
    return Recipe.of([{"train": {"epochs": 2, "hold_out": 0, "keep": "last", **settings}}]).steps[0]


def same(a: nn.Module, b: nn.Module, atol: float = 0.0) -> bool:
    return all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_one_cycle_is_that_of_torch() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    act = Train(schedule="one-cycle", optimizer="sgd", lr=0.5, momentum=0.95)
    ours, theirs = (optimizer_of(act, parameters) for _ in range(2))
    total = 41
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        theirs, 0.5, total_steps=total, base_momentum=0.85, max_momentum=0.95
    )
    for i in range(total):
        # torch counts its last step as the end of the cycle, and the peak one step before its share
        progress = i / (total - 1)
        peak = 0.3 * total - 1
        progress = progress * 0.3 / (peak / (total - 1)) if i < peak else 0.3 + 0.7 * (i - peak) / (total - 1 - peak)
        assert set_rates(ours, act, progress) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-5, abs=1e-9)
        assert ours.param_groups[0]["momentum"] == pytest.approx(theirs.param_groups[0]["momentum"], rel=1e-5)
        theirs.step()
        schedule.step() if i + 1 < total else None
    assert rate(Train(schedule="one-cycle", warmup=0.5), 0.5) == 1 and momentum(Train(), 0.3) == 0.9


def test_accumulated_gradients_are_those_of_the_larger_batch(data: Data) -> None:
    x, y = data.train.inputs[:100], data.train.labels[:100]  # type: ignore[union-attr]
    ends = []
    for size, accumulate in ((64, 1), (16, 4), (25, 2)):
        model = mlp()
        loop = Loop(Data(train=Batches(x, y, size)))
        fit(model, step(accumulate=accumulate, optimizer="sgd", lr=0.1), loop)
        ends.append(model)
    assert same(ends[0], ends[1], 1e-6) and not same(ends[0], ends[2], 1e-6)


def test_clipping_and_the_number_of_steps(data: Data) -> None:
    before, after = mlp(), mlp()
    fit(after, step(clip=0.01, optimizer="sgd", momentum=0, schedule="constant", lr=1.0, steps=3), Loop(data))
    with torch.no_grad():
        moved = [(a - b).square().sum() for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0.02 < float(sum(moved)) ** 0.5 <= 0.03 + 1e-6


def test_the_average_by_hand(data: Data) -> None:
    model = mlp()
    with smelt.training(model, [{"prune.weights": {"ratio": 0.5}}], steps=30) as t:
        average, expected = Average(t, 0.9), t.state()["2.weight/"]
        for n in range(1, 13):
            with torch.no_grad():
                for p in t.parameters():
                    p.add_(torch.randn_like(p))
            t.step()
            average.update()
            d = min(0.9, (1 + n) / (10 + n))
            expected = d * expected + (1 - d) * dict(t.named_parameters())["2.weight/"].detach()
        torch.testing.assert_close(average.values["2.weight/"], expected)
        assert average.values["2.weight/link0.mask"].dtype == torch.bool
        before = t.state()
        with average.standing():
            assert torch.equal(t.tensors()["2.bias"], average.values["2.bias"])
        assert all(torch.equal(v, before[k]) for k, v in t.state().items())
        t.done = 30


def test_the_average_is_what_is_kept(data: Data) -> None:
    plain, averaged = mlp(), mlp()
    seen: list[torch.Tensor] = []
    fit(plain, step(lr=0.05), Loop(data))
    act = Recipe.of([{"train": {"epochs": 2, "lr": 0.05, "ema": 0.95}}]).steps[0]
    fit(averaged, act, Loop(data, score=lambda model, _: seen.append(model[0].weight.detach().clone()) or len(seen)))  # type: ignore[func-returns-value,index]
    assert torch.equal(seen[-1], averaged[0].weight) and not same(plain, averaged, 1e-4)


def test_batch_norms_are_taken_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    batches = [torch.randn(16, 3) for _ in range(3)]
    hidden = [model[0](x).detach() for x in batches]
    renew_norms(model, batches, 2, lambda x: x)
    torch.testing.assert_close(model[1].running_mean, (hidden[0].mean(0) + hidden[1].mean(0)) / 2)
    torch.testing.assert_close(model[1].running_var, (hidden[0].var(0) + hidden[1].var(0)) / 2)
    assert model[1].momentum == 0.1 and model.training
    loop = Loop(Data(train=Batches(torch.cat(batches), torch.zeros(48).long(), 16)))
    fit(model, step(renorm=3, lr=0.1), loop)
    means = torch.stack([model[0](x).detach().mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)


def test_mixup_and_cutmix_by_hand() -> None:
    x, y = torch.arange(6.0)[:, None].expand(6, 3).contiguous(), torch.arange(6)
    for seed in range(5):
        one = mixed(Train(mixup=0.4), x, y, seed)
        assert 0.5 <= one.share <= 1
        torch.testing.assert_close(one.inputs[:, 0], one.share * one.labels + (1 - one.share) * one.others)
        out = torch.randn(6, 6)
        expected = one.share * task_loss(out, one.labels) + (1 - one.share) * task_loss(out, one.others)
        torch.testing.assert_close(one.loss(out, one.labels, task_loss), expected)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8).contiguous()
    for seed in range(5):
        one = mixed(Train(cutmix=1.0), images, torch.arange(4), seed)
        own = (one.inputs == one.labels[:, None, None, None]).float().mean((1, 2, 3))
        moved = one.labels != one.others
        torch.testing.assert_close(own[moved], torch.full_like(own[moved], one.share))
    assert torch.equal(mixed(Train(mixup=1.0), images, None, 3).inputs, mixed(Train(mixup=1.0), images, None, 3).inputs)
    shares = np.array([mixed(Train(mixup=1.0), x, y, seed).share for seed in range(300)])
    assert shares.mean() == pytest.approx(0.75, abs=0.03)  # the larger part of a uniform share
    with pytest.raises(DataError, match=r"train.cutmix needs images.*float32 \[6, 3\]"):
        mixed(Train(cutmix=1.0), x, y, 0)


def test_mixing_smoothing_and_half_precision_train(data: Data) -> None:
    for more in ({"mixup": 0.2}, {"smoothing": 0.1}, {"precision": "float16", "clip": 1.0}, {"schedule": "one-cycle"}):
        model = mlp()
        fit(model, step(epochs=6, lr=1e-2, **more), Loop(data))
        right = (model(data.test.inputs).argmax(1) == data.test.labels).float().mean()  # type: ignore[union-attr]
        assert float(right) > 0.85, more
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    smooth = -(0.7 * logits.log_softmax(1)[range(4), labels] + 0.3 * logits.log_softmax(1).mean(1)).mean()
    torch.testing.assert_close(task_loss(logits, labels, 0.3), smooth)
    with pytest.raises(RecipeError, match="smoothing is of the usual loss"):
        fit(mlp(), step(smoothing=0.1), Loop(data, loss=nn.functional.cross_entropy))


def test_recorded_logits_do_not_fit_mixed_inputs(data: Data) -> None:
    calls = []

    def teacher(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.zeros(len(x), 2)

    guided = [Guided(x, y, torch.zeros(len(x), 2)) for x, y in data.train]  # type: ignore[union-attr]
    act = [{"distill.logits": {"alpha": 0}}]
    fit(mlp(), step(epochs=1, **{"with": act}), Loop(Data(train=guided), teacher))
    assert not calls
    fit(mlp(), step(epochs=1, mixup=1.0, **{"with": act}), Loop(Data(train=guided), teacher))
    assert len(calls) == 8


def test_the_log_is_a_table_of_updates(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    job = smelt.Job(data=data, latency=False, log=path)
    smelt.compress(mlp(), [{"train": {"epochs": 2}}, {"prune.weights": {"recover": {"epochs": 1}}}], job)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["step"], row["update"]) for row in rows if row["loss"]][-8:] == [("3", str(i)) for i in range(1, 9)]
    assert [row["step"] for row in rows if row["held out"]] == ["1", "1"]
    assert all(float(row["rate"]) > 0 for row in rows if row["loss"])


def test_tensorboard_is_asked_for_in_one_line(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OutputError, match=r"smelt\[tensorboard\]"):
        fit(mlp(), step(), Loop(data, log=tmp_path / "runs"))


def test_tensorboard(data: Data, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    fit(mlp(), step(), Loop(data, log=tmp_path / "runs"))
    assert list((tmp_path / "runs" / "step1").iterdir())
