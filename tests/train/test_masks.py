"""Masks that move in training: movement pruning, regrowth, how often."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.data import Data
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe
from smelt.core.settings import Ramp
from smelt.methods.prune.weights import Weights
from smelt.train.loop import Loop, fit
from smelt.train.slot import Link
from tests.conftest import mlp


def run(model: nn.Module, t: smelt.training, n: int, lr: float = 1e-2) -> list[tuple[Tensor, Tensor]]:
    """Adam; after each step (weight as the model used it, the leaf behind it) of one layer."""
    leaf = dict(t.named_parameters())["2.weight/"]
    t.optimizer = torch.optim.Adam(t.parameters(), lr)
    generator, seen = torch.Generator().manual_seed(0), []
    for _ in range(n):
        x = torch.randn(64, 2, generator=generator)
        t.optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > x[:, 1]).long()).backward()
        seen.append((model[2].weight.detach().clone(), leaf.detach().clone()))  # type: ignore[index,union-attr]
        t.optimizer.step()
        t.step()
    return seen


def link_of(t: smelt.training) -> Link:
    """Of the layer that `run` looks at."""
    (group,) = t._groups
    return next(link for s, link in zip(group.slots, group.links, strict=True) if s.target.name == "2.weight")


def test_movement_is_the_sum_over_steps_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    xs = torch.randn(3, 5, 3)
    with smelt.training(model, [Weights(score="movement", ratio=0.5)]) as t:
        (leaf,) = t.parameters()
        start = leaf.detach().clone()
        used = model[0].weight.detach()
        assert torch.equal(used != 0, start.abs() >= start.abs().flatten().topk(6).values[-1])  # at first: magnitude
        expected = torch.zeros(4, 3)
        for x in xs:
            model(x).square().sum().backward()
            slope = 2 * (x @ used.T).T @ x  # dense: for masked weights, too
            expected -= start * slope
        (link,) = t._groups[0].links
        torch.testing.assert_close(link.seen["movement"], expected)
        assert bool((leaf.grad == 0)[used == 0].all())  # type: ignore[index]


def test_movement_keeps_what_moves_away_from_zero() -> None:
    model = mlp()
    with smelt.training(model, [Weights(score="movement", ratio=Ramp(0, 0.5))], steps=20) as t:
        run(model, t, 20)
        link = link_of(t)
        kept = link.seen["movement"].flatten()[model[2].weight.flatten() != 0]
    assert float((model[2].weight == 0).float().mean()) == 0.5
    assert float(kept.mean()) > float(link.seen["movement"].mean())


def test_regrowth_exchanges_weights_that_start_at_zero() -> None:
    model, every = mlp(), 5
    with smelt.training(model, [Weights(ratio=0.8, regrow=0.3, every=every)], steps=40) as t:
        masks, used = [], []
        leaf = dict(t.named_parameters())["2.weight/"]
        for _ in range(40):
            before = leaf.detach().clone()
            used += [weight for weight, _ in run(model, t, 1)]
            masks.append(link_of(t).state.get_buffer("mask").clone())  # type: ignore[union-attr]
            new = masks[-1] & ~masks[-2] if len(masks) > 1 else torch.zeros_like(masks[0])
            assert not bool((leaf[new] != 0).any())  # they start at 0
            assert len(masks) % every == 0 or not bool(new.any())
            assert not bool((used[-1] != 0)[before == 0].any())
    n = round(0.2 * 64 * 64)
    assert all(int(mask.sum()) == n for mask in masks)
    moved = [int((masks[i] & ~masks[i - 1]).sum()) for i in range(every - 1, 40, every)]
    most = [
        round(n * 0.15 * (1 + math.cos(math.pi * min(1, (i + 1) / 40 / 0.75)))) for i in range(every - 1, 40, every)
    ]
    assert all(0.3 * top <= found <= top for found, top in zip(moved, most, strict=True))
    assert moved[0] > 20 and moved[-2:] == [0, 0]
    learnt = masks[every] & ~masks[every - 2]
    assert bool((used[every + 1][learnt] != 0).any())


def test_moments_of_regrown_weights_are_forgotten() -> None:
    model = mlp()
    with smelt.training(model, [Weights(ratio=0.5, regrow=0.5, every=3)], steps=40) as t:
        run(model, t, 2)
        before = model[2].weight.detach() != 0
        leaf = dict(t.named_parameters())["2.weight/"]
        assert t.optimizer is not None
        moments = t.optimizer.state[leaf]["exp_avg"]
        moments.fill_(1)
        t.step()
        model(torch.randn(1, 2))
        link = link_of(t)
        fresh = link.state.get_buffer("mask") & ~before  # type: ignore[union-attr]
        assert bool(fresh.any()) and bool((moments[fresh] == 0).all()) and bool((moments[~fresh] == 1).all())
        t.done = 40


def test_the_mask_moves_every_so_many_steps() -> None:
    model = mlp()
    with smelt.training(model, [Weights(ratio=Ramp(0, 0.8), every=10)], steps=40) as t:
        zeros = [float((weight == 0).float().mean()) for weight, _ in run(model, t, 40)]
    changes = [i for i in range(1, 40) if zeros[i] != zeros[i - 1]]
    assert changes == [10, 20, 30] and zeros[-1] == pytest.approx(0.8, abs=1e-3)


class StopAfter(Progress):
    def __init__(self, batches: int):
        self.batches = batches

    def advance(self, done: int, total: int, text: str = "") -> None:
        if done == self.batches:
            raise KeyboardInterrupt


@pytest.mark.parametrize("piece", [{"score": "movement", "ratio": {"ramp": [0, 0.8]}}, {"regrow": 0.3, "every": 4}])
def test_an_interrupted_loop_resumes_to_the_same_masks(piece: dict[str, object], data: Data, tmp_path: Path) -> None:
    act = Recipe.of(
        {"steps": [{"train": {"epochs": 4, "hold_out": 0, "keep": "last", "with": [{"prune.weights": piece}]}}]}
    ).steps[0]
    whole, resumed = mlp(), mlp()
    fit(whole, act, Loop(data))
    loop = Loop(data, checkpoint=tmp_path / "state.training")
    with pytest.raises(KeyboardInterrupt):
        fit(mlp(), act, loop, StopAfter(8 * 2 + 3))
    fit(resumed, act, loop)
    expected = whole.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in resumed.state_dict().items())
