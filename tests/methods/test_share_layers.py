"""share.layers: who is alike, what the mean is, and that matching units changes no output."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.edit import apply_all
from smelt.core.method import Known
from smelt.core.target import select, targets
from smelt.methods.share.layers import Layers


class Blocks(nn.Module):
    """Blocks of two layers around a stream, as transformers have them."""

    def __init__(self, depth: int = 4, norm: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            middle = [nn.BatchNorm1d(12)] if norm else []
            self.blocks.append(nn.Sequential(nn.Linear(6, 12), *middle, nn.ReLU(), nn.Linear(12, 6)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def places(model: nn.Module) -> dict[str, int]:
    return {t.name: len(t.places) for t in targets(model) if t.is_weight}


def test_alike_weights_become_their_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks()
    result = smelt.compress(model, ["share.layers"])
    assert places(result.model) == {"blocks.0.0.weight": 4, "blocks.0.2.weight": 4, "head.weight": 1}
    mean = torch.stack([block[0].weight for block in model.blocks]).mean(0)  # type: ignore[index]
    torch.testing.assert_close(result.model.blocks[3][0].weight, mean)
    assert torch.equal(result.model.blocks[3][0].bias, model.blocks[3][0].bias)  # type: ignore[index]
    note = "1: share.layers leaves head.weight as it is: no other selected tensor is [3, 6] with a name that differs"
    assert any(n.startswith(note) for n in result.report.notes)
    size = result.save(tmp_path / "tied.smelt")
    assert size < 4 * (2 * 72 + 18 + 4 * 18 + 3) + 1200
    loaded = smelt.load(tmp_path / "tied.smelt", into=Blocks())
    assert loaded.blocks[0][0].weight is loaded.blocks[2][0].weight
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), result.model(x))
    with smelt.training(loaded) as t:
        slots = [p for p in t.parameters() if p.shape == (12, 6)]
        loaded(x).sum().backward()
    assert len(slots) == 1 and slots[0].grad is not None


def test_runs_names_and_biases() -> None:
    runs = smelt.compress(Blocks(), [{"share.layers": {"groups": 2}}]).model
    assert runs.blocks[0][0].weight is runs.blocks[1][0].weight is not runs.blocks[2][0].weight
    assert runs.blocks[2][0].weight is runs.blocks[3][0].weight
    every = smelt.compress(Blocks(), [{"share.layers": {"on": ["*", "*.bias"]}}]).model
    assert every.blocks[0][2].bias is every.blocks[3][2].bias
    named = nn.ModuleDict({name: nn.Linear(5, 5) for name in "abc"})
    assert smelt.compress(named, ["share.layers"]).report.notes[-1].endswith("found nothing to change")
    assert len(places(smelt.compress(named, [{"share.layers": {"alike": "shape"}}]).model)) == 1
    other = nn.ModuleList([nn.Embedding(5, 5), nn.Linear(5, 5)])
    assert len(places(smelt.compress(other, [{"share.layers": {"alike": "shape"}}]).model)) == 2
    reason = Layers().refuses(targets(nn.LSTM(4, 4, 2))[0])
    assert reason is not None and "list of its weights" in reason


def shuffled(model: Blocks, seed: int) -> None:
    """The hidden units of every block but the first in another order."""
    generator = torch.Generator().manual_seed(seed)
    for block in list(model.blocks)[1:]:
        order = torch.randperm(12, generator=generator)
        first, last = block[0], block[-1]  # type: ignore[index]
        for tensor in (first.weight, first.bias):
            tensor.data = tensor.data[order]
        last.weight.data = last.weight.data[:, order]
        if isinstance(norm := block[1], nn.BatchNorm1d):  # type: ignore[index]
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name).data = getattr(norm, name).data[order]


@pytest.mark.parametrize("norm", [False, True])
def test_matching_finds_the_order_of_the_first(norm: bool) -> None:
    torch.manual_seed(0)
    model = Blocks(3, norm).eval()
    for block in model.blocks:
        if norm:
            block[1].running_mean.normal_()  # type: ignore[index,union-attr]
            block[1].running_var.uniform_(0.5, 2)  # type: ignore[index,union-attr]
    for name, tensor in [*model.blocks[0].named_parameters(), *model.blocks[0].named_buffers()]:
        for block in list(model.blocks)[1:]:
            dict([*block.named_parameters(), *block.named_buffers()])[name].data = tensor.data.clone()
    x = torch.randn(7, 6)
    shuffled(model, 1)
    wanted = model(x)
    matched = smelt.compress(model, [{"share.layers": {"match": True}}]).model
    torch.testing.assert_close(matched(x), wanted)  # blocks that were equal up to an order
    apart = smelt.compress(model, ["share.layers"]).model
    assert float((apart(x) - wanted).detach().abs().max()) > 0.01


def test_matching_alone_changes_no_output_and_brings_weights_nearer() -> None:
    torch.manual_seed(0)
    model = Blocks(2).eval()
    x, before = torch.randn(7, 6), [block[0].weight.clone() for block in model.blocks]  # type: ignore[index]
    wanted = model(x)
    edits = Layers(match=True).plan(model, select(targets(model), ["blocks.*"]), Known())
    moved = [e for e in edits if getattr(e, "tensor", "") == "blocks.1.0.bias"]
    assert len(moved) == 1
    mean = next(e.value for e in edits if getattr(e, "tensor", "") == "blocks.0.0.weight")  # type: ignore[attr-defined]
    order = [model.blocks[1][0].bias.tolist().index(b) for b in moved[0].value.tolist()]  # type: ignore[index,attr-defined]
    assert sorted(order) == list(range(12))
    torch.testing.assert_close(mean, (before[0] + before[1][order]) / 2)
    last = model.blocks[1][2]  # type: ignore[index]
    pairs = [(before[0], before[1]), (model.blocks[0][2].weight.T, last.weight.T)]  # type: ignore[index]
    near = [sum(float((a - b[list(o)]).detach().square().sum()) for a, b in pairs) for o in (order, range(12))]
    assert near[0] < near[1]
    apply_all(model, [e for e in edits if e.kind == "fill" and e.tensor == "blocks.1.0.bias"])  # type: ignore[attr-defined]
    model.blocks[1][0].weight.data = before[1][order]  # type: ignore[index]
    last.weight.data = last.weight.data[:, order]
    torch.testing.assert_close(model(x), wanted)


def test_what_is_stored_already_is_not_tied() -> None:
    with pytest.raises(smelt.SmeltError, match=r"share.layers changes blocks.0.0.weight.*put 2: share.layers before"):
        smelt.compress(Blocks(), [{"share.kmeans": {"clusters": 2}}, "share.layers"])
