from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.method import Known, make
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.grids.hadamard import hadamard, rotation
from tests.methods.test_swap_equalize import IDS, Decoder
from tests.methods.test_swap_norms import IMAGES, lively, swapped


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 48, 60, 256])
def test_hadamard_matrices(n: int) -> None:
    found = hadamard(n)
    assert found is not None and bool((found.abs() == 1).all())
    assert torch.equal(found @ found.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(("n", "kind"), [(6, "hadamard"), (16, "hadamard"), (16, "orthogonal"), (12, "hadamard")])
def test_rotations_are_orthogonal_and_repeat(n: int, kind: str) -> None:
    made, again = (rotation(n, torch.Generator().manual_seed(4), kind) for _ in range(2))
    torch.testing.assert_close(made @ made.T, torch.eye(n, dtype=torch.float64))
    assert torch.equal(made, again) and not torch.equal(made, rotation(n, torch.Generator().manual_seed(5), kind))


class Vision(nn.Module):
    """Patches, a class token, positions, encoder layers with LayerNorm before them."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 12, 3, 3)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 10, 12))
        layer = nn.TransformerEncoderLayer(12, 2, 24, activation="gelu", batch_first=True, norm_first=first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.encoder(x))[:, 0])


@pytest.mark.parametrize(("make_it", "x"), [(Decoder, IDS), (Vision, IMAGES)], ids=["decoder", "vision"])
@pytest.mark.parametrize("of", ["all", "stream", "heads"])
def test_outputs_stay_and_the_file_is_built_again(make_it: Any, x: Tensor, of: str, tmp_path: Path) -> None:
    model = lively(make_it())
    before, old = model(x), {n: p.clone() for n, p in model.named_parameters()}
    data = smelt.Data(train=[(x, torch.zeros(len(x), dtype=torch.int64))])
    result = smelt.compress(
        model, [{"swap.rotate": {"of": of}}], smelt.Job(data=data, latency=False, metric=lambda y, _: float(y.mean()))
    )
    with torch.no_grad():
        assert float((result.model(x) - before).abs().max() / before.abs().max()) < 1e-5
    moved = {n for n, p in result.model.named_parameters() if not torch.equal(p, old.get(n, p[:0]))}
    writer = "embed.weight" if make_it is Decoder else "patch.weight"
    assert (writer in moved) == (of != "heads") and len(moved) > 3
    result.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=make_it().eval())
    assert torch.equal(loaded(x), result.model(x))


def test_outliers_are_spread() -> None:
    model = lively(Decoder())
    with torch.no_grad():
        model.embed.weight[:, 3] *= 40
        for block in model.blocks:
            block.o.weight[3] *= 40

    @torch.no_grad()
    def peak() -> float:
        found: list[Tensor] = []
        handle = model.blocks[1].q.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        model(IDS)
        handle.remove()
        return float(found[0].abs().max() / found[0].square().mean().sqrt())

    with torch.no_grad():
        model.blocks[1].norm1.weight.fill_(1)
    before = peak()
    swapped(model, IDS, "swap.rotate")
    assert peak() < 0.75 * before


def test_a_tie_is_kept_where_no_gain_stands_before_the_head() -> None:
    model = lively(Decoder(tied=True))
    with torch.no_grad():
        model.norm.weight.fill_(1)
    before = model(IDS)
    swapped(model, IDS, "swap.rotate", of="stream")
    torch.testing.assert_close(model(IDS), before, atol=1e-4, rtol=1e-4)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.blocks[0].norm1.weight, torch.ones(16))


def test_a_tie_with_a_gain_is_refused_or_untied(tmp_path: Path) -> None:
    model = lively(Decoder(tied=True))
    before, old = model(IDS), model.embed.weight.clone()
    notes = swapped(model, IDS, "swap.rotate", of="stream")
    assert torch.equal(model.embed.weight, old)
    assert any("no stream can be rotated" in n and "norm: " in n and "tied" in n for n in notes), notes
    data = smelt.Data(train=[(IDS, IDS)])
    steps = [{"swap.rotate": {"untie": True}}]
    result = smelt.compress(model, steps, smelt.Job(data=data, latency=False))
    torch.testing.assert_close(result.model(IDS), before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(result.model.head.weight, result.model.embed.weight)
    result.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=Decoder(tied=True).eval())
    assert torch.equal(loaded(IDS), result.model(IDS))


def test_norms_behind_the_addition_let_no_rotation_pass() -> None:
    model = lively(Vision(first=False))
    before = model(IMAGES)
    notes = swapped(model, IMAGES, "swap.rotate", of="stream")
    assert torch.equal(model(IMAGES), before)
    assert any("no stream can be rotated" in n and "encoder.layers.0.norm1" in n for n in notes)


def test_it_repeats_exactly() -> None:
    states = []
    for seed in (0, 0, 1):
        model = lively(Decoder())
        edits = make("swap.rotate").plan(model, targets(model), Known(batches=[(IDS, None)], seed=seed))
        apply_edits(model, edits, "swap.rotate")
        states.append(model.embed.weight.clone())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
