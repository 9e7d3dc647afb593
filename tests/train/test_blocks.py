"""A train step with scope: block: what it stores, what it aims at, resuming, repeating, refusing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.data import Batches, Data
from smelt.core.errors import DataError, ModelError, RecipeError, RuleError
from smelt.core.method import Inside, Stats
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step
from smelt.core.store import check_fresh, store_of
from smelt.core.target import targets
from smelt.core.walk import rebuilt
from smelt.grids import offsets, uniform
from smelt.methods.quantize.gptq import GPTQ
from smelt.statistics.gram import Gram
from smelt.train import blocks
from smelt.train.blocks import rebuild
from smelt.train.loop import Loop
from smelt.train.rates import SignSGD


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 4)
        self.layers = nn.ModuleList(Part() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    causes = torch.randn(192, 3, generator=generator) @ torch.randn(3, 6, generator=generator)
    return causes + 0.3 * torch.randn(192, 6, generator=generator)


GROUPS = {"per": "group", "group": 6, "bits": 2}
GPTQS = {"quantize.gptq": {**GROUPS, "learn": True}}


def step(*pieces: Any, **settings: Any) -> Step:
    loop = {"scope": "block", "epochs": 4, "lr": 0.005, "schedule": "linear", **settings}
    return Recipe.of({"steps": [{"train": {**loop, "with": list(pieces)}}]}).steps[0]


def loop(**more: Any) -> Loop:
    return Loop(Data(train=Batches(inputs(), batch_size=32, shuffle=True)), **more)


def missed(model: nn.Module) -> float:
    with torch.no_grad():
        aim = Net()(inputs())
        return float((model(inputs()) - aim).square().mean() / aim.square().mean())


@pytest.mark.parametrize(
    "piece",
    [
        GPTQS,
        {"quantize.gptq": {**GROUPS, "learn": True, "zero": "whole"}},
        {"quantize.gptq": {**GROUPS, "learn": True, "symmetric": True}},
        {"quantize.adaround": {**GROUPS, "steps": 20}},
        {"quantize.affine": {**GROUPS, "symmetric": False, "learn": True}},
    ],
)
def test_a_block_is_stored_as_it_was_simulated_last(piece: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    last: dict[str, float] = {}
    whole = blocks._Fit.go

    def go(self: Any, *args: Any) -> tuple[float, float]:
        found = whole(self, *args)
        last[self.block.path] = self.error()
        return found

    monkeypatch.setattr(blocks._Fit, "go", go)
    model = Net()
    rebuild(model, step(piece, epochs=2), loop())
    check_fresh(model)
    assert len(store_of(model).entries) == 6 and list(last) == ["stem", "layers.0", "layers.1", "head"]
    members = [t for t in targets(model) if t.is_weight]
    for block in rebuilt(model, Net(), members, loop().data.train or (), None):
        errors = [
            (model.get_submodule(block.path)(*args, **kwargs) - aim).square().mean() / aim.square().mean()
            for (args, kwargs), aim in zip(block.calls, block.aims, strict=True)
        ]
        assert float(sum(errors)) / len(errors) == pytest.approx(last[block.path], rel=1e-5)


def test_it_comes_closer_than_the_same_rounding_layer_by_layer() -> None:
    where = {**GROUPS, "on": "layers.*"}
    alone = smelt.compress(Net(), [{"quantize.gptq": where}], smelt.Job(data=loop().data, latency=False))
    for optimizer, momentum in (("adam", 0.9), ("sign", 0.0)):
        model, piece = Net(), {"quantize.gptq": {**where, "learn": True}}
        notes = rebuild(model, step(piece, epochs=20, lr=0.02, optimizer=optimizer, momentum=momentum), loop())
        assert missed(model) < 0.9 * missed(alone.model)
        assert "blocks miss" in notes[-1]


def test_the_original_is_aimed_at_on_its_own_inputs() -> None:
    model, seen = Net(), {}
    with torch.no_grad():
        model.stem.weight.mul_(1.1)
    members = [t for t in targets(model) if t.is_weight]
    for block in rebuilt(model, Net(), members, [inputs()], None):
        seen[block.path] = (block.calls[0][0][0], block.aims[0], [t.name for t in block.members])
    assert list(seen) == ["stem", "layers.0", "layers.1", "head"]
    with torch.no_grad():
        original = Net()
        first, now = original.stem(inputs()), model.stem(inputs())
        torch.testing.assert_close(seen["layers.0"][0], now)
        torch.testing.assert_close(seen["layers.0"][1], original.layers[0](first))
        torch.testing.assert_close(seen["head"][0], model.layers[1](model.layers[0](now)))
        torch.testing.assert_close(seen["head"][1], original(inputs()))
    assert seen["layers.1"][2] == ["layers.1.up.weight", "layers.1.down.weight"]


def test_what_was_pruned_before_learns_and_stays_pruned() -> None:
    steps = [{"prune.weights": {"ratio": 0.5}}]
    job = smelt.Job(data=loop().data, latency=False)
    pruned = smelt.compress(Net(), steps, job).model
    train = {"train": {"scope": "block", "epochs": 10, "lr": 0.003}}
    found = smelt.compress(Net(), [*steps, train], job).model
    assert missed(found) < 0.5 * missed(pruned)
    for before, after in zip(targets(pruned), targets(found), strict=True):
        if before.is_weight:
            assert torch.equal(before.tensor == 0, after.tensor == 0)
        else:
            assert torch.equal(before.tensor, after.tensor)


def test_the_same_seed_gives_the_same_weights_and_an_interrupted_step_goes_on(tmp_path: Path) -> None:
    class Stop(Progress):
        def advance(self, done: int, total: int, text: str = "") -> None:
            if text.startswith("layers.1") and done == 5:
                raise KeyboardInterrupt

    whole, again, other = Net(), Net(), Net()
    rebuild(whole, step(GPTQS), loop(seed=3))
    rebuild(other, step(GPTQS), loop(seed=4))
    at = loop(seed=3, checkpoint=tmp_path / "state.training")
    with pytest.raises(KeyboardInterrupt):
        rebuild(Net(), step(GPTQS), at, Stop())
    assert (tmp_path / "state.training").exists()
    rebuild(again, step(GPTQS), at)
    assert not (tmp_path / "state.training").exists()
    expected = whole.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in again.state_dict().items())
    assert not torch.equal(whole.layers[0].up.weight, other.layers[0].up.weight)


def test_the_better_of_the_start_and_the_end_is_kept() -> None:
    start = Net()
    rebuild(start, step(GPTQS, lr=0.0), loop())
    for keep in ("best", "last"):
        model = Net()
        rebuild(model, step(GPTQS, lr=2.0, schedule="constant", keep=keep), loop())
        same = torch.equal(model.layers[0].up.weight, start.layers[0].up.weight)
        assert same == (keep == "best")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"ema": 0.9}, "ema does not go with scope: block"),
        ({"scope": "model", "batches": 4}, "batches does not go with scope: model"),
        ({"scope": "blocks"}, "no choice 'blocks'"),
        ({"precision": "float16"}, "float16 needs scope: model"),
    ],
)
def test_settings_of_the_other_scope_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        step(GPTQS, **settings)


def test_what_cannot_be_rebuilt_is_refused() -> None:
    for piece in ({"distill.logits": {}}, {"lowrank.svd": {"rank": 1}}):
        with pytest.raises(RuleError, match="codecs only"):
            step(piece)
    with pytest.raises(DataError, match="needs training data"):
        rebuild(Net(), step(GPTQS), Loop(Data()))
    with pytest.raises(DataError, match="it is no module"):
        rebuild(Net(), step(GPTQS), loop(teacher=lambda x: x))
    with pytest.raises(ModelError, match="no module 'stem'"):
        rebuild(Net(), step(GPTQS), loop(teacher=nn.Linear(6, 4)))
    with pytest.raises(RuleError, match="nothing to learn"):
        rebuild(Net(), step(), loop())


def test_offsets_start_at_the_codes_and_are_small() -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)).clamp(-0.6, 0.7)
    scale, zero = torch.tensor(0.4), torch.tensor(1.3)
    nearest = uniform.dequantize(uniform.quantize(x, scale, zero, bits=2, symmetric=False), scale, zero)
    moved = (nearest + scale * torch.randint(-1, 2, (200,), generator=torch.Generator().manual_seed(1))).clamp(
        float(-zero * scale), float((3 - zero) * scale)
    )
    v = offsets.start(x, moved, scale, zero, bits=2)
    found = uniform.dequantize((x / scale + zero + v).round().clamp(0, 3), scale, zero)
    torch.testing.assert_close(found, moved)
    assert float(v.abs().max()) <= 2 and float(offsets.start(x, nearest, scale, zero, bits=2).abs().max()) < 0.051


def test_ranges_move_by_their_ends() -> None:
    """Low -1, high 2 of two bits; the ends move to -0.7 and 1.7."""
    scale, zero = offsets.sides(torch.tensor(1.0), torch.tensor(1.0), torch.tensor([0.1, -0.1]), bits=2, fixed=False)
    assert zero is not None
    assert float(-zero * scale) == pytest.approx(-0.7) and float((3 - zero) * scale) == pytest.approx(1.7)


def test_learned_rounding_has_the_slopes_of_the_paper() -> None:
    """By autograd through round() taken as the identity."""
    layer = nn.Linear(8, 4)
    gram, w = Gram(layer), layer.weight.detach()
    gram.update(torch.randn(50, 8))
    codec = GPTQ(bits=3, per="group", group=4, learn=True, scales="float32")
    state: Any = codec.fit(w, Stats(gathered={"gram": gram.result()}, inside=Inside()))
    slope = torch.randn(4, 8)
    (codec.simulate(w, state) * slope).sum().backward()
    v, ends = (p.detach().clone().requires_grad_() for p in (state.offset, state.ends))
    scale, zero = offsets.sides(state.scale, state.zero, ends, bits=3, fixed=False)
    assert zero is not None
    scale, zero = (s.repeat_interleave(4, 1) for s in (scale, zero))
    place = (w / scale + zero + v).clamp(-0.5, 7.5)
    codes = place + (place.round().clamp(0, 7) - place).detach()
    ((codes - zero) * scale * slope).sum().backward()
    torch.testing.assert_close(state.offset.grad, v.grad)
    torch.testing.assert_close(state.ends.grad, ends.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(codec.encode(w, state).decode(), codec.simulate(w, state).detach())


def test_signed_steps_are_all_alike() -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = SignSGD([x], lr=0.1, weight_decay=0.5)
    x.grad = torch.tensor([5.0, -0.001, 0.0])
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.tensor([0.85, 2.0, 2.85]))
