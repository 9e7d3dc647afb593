"""lowrank.triangular: exact on matrices of low rank, and the residuals that the decompositions leave."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from smelt.core.edit import Note, Replace
from smelt.core.errors import RecipeError
from smelt.core.method import Known
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.methods.lowrank.triangular import Triangular

SHAPES: dict[str, Any] = {
    "linear": (lambda: nn.Linear(20, 30), (5, 20)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 5, stride=2, padding=3, dilation=2), (2, 8, 30)),
    "conv2d": (lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 3)), (2, 8, 11, 12)),
    "embedding": (lambda: nn.Embedding(40, 24), (3, 7)),
}


def split(model: nn.Module, **settings: Any) -> list[Any]:
    found = Triangular(**settings).plan(model, [t for t in targets(model) if t.is_weight], Known())
    apply_edits(model, found, "lowrank.triangular")
    return found


def product(layer: nn.Module) -> torch.Tensor:
    return layer[1].weight @ layer[0].weight  # type: ignore[index, no-any-return, union-attr]


@pytest.mark.parametrize("form", ["factors", "pivoted"])
@pytest.mark.parametrize("by", ["qr", "lu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_low_rank_is_found_exactly(kind: str, by: str, form: str) -> None:
    torch.manual_seed(0)
    make, shape = SHAPES[kind]
    model = nn.Sequential(make(), nn.ReLU()).double().eval()
    weight = model[0].weight
    flat = weight.T if kind == "embedding" else weight.flatten(1)
    low = torch.randn(flat.shape[0], 3).double() @ torch.randn(3, flat.shape[1]).double()
    with torch.no_grad():
        weight.copy_(low.T if kind == "embedding" else low.reshape(weight.shape))
    x = torch.randint(0, 40, shape) if kind == "embedding" else torch.randn(shape).double()
    before, count = model(x), sum(flat.shape)
    (edit,) = split(model, rank=3, by=by, form=form)
    assert isinstance(edit, Replace)
    torch.testing.assert_close(model(x), before)
    left = sum(p.numel() for n, p in model.named_parameters() if "weight" in n)
    assert left == 3 * (count - (3 if form == "pivoted" else 0))


def test_qr_leaves_what_the_rest_of_r_holds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60, bias=False), nn.ReLU()).double()
    weight = model[0].weight.detach().clone()
    split(model, rank=7)
    r = scipy.linalg.qr(weight.numpy(), mode="r", pivoting=True)[0]
    error = (weight - product(model[0])).norm().item()
    assert error == pytest.approx(float(np.linalg.norm(r[7:])))
    assert error > torch.linalg.svdvals(weight)[7:].norm().item()


def test_lu_meets_the_rows_and_columns_of_its_pivots() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()).double()
    weight = torch.tensor([[8.0, 4, 0, 0], [4, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0.5]]).double()
    with torch.no_grad():
        model[0].weight.copy_(weight)
    split(model, rank=1, by="lu")  # the pivot is 8: [1, 1/2, 0, 0]^T [8, 4, 0, 0]
    wanted = torch.zeros(4, 4).double()
    wanted[:2] = torch.tensor([[8.0, 4, 0, 0], [4, 2, 0, 0]])
    torch.testing.assert_close(product(model[0]), wanted)


@pytest.mark.parametrize("by", ["qr", "lu"])
def test_energy_and_ratio(by: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60, bias=False), nn.Linear(60, 60, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(60, 5) @ torch.randn(5, 60) + 0.01 * torch.randn(60, 60))
    weight = model[0].weight.detach().clone()
    found = split(model, energy=0.999, by=by)
    rank = model[0][0].out_features  # type: ignore[index, union-attr]
    assert rank == 5 and (weight - product(model[0])).square().sum() <= 0.001 * weight.square().sum()
    assert isinstance(found[1], Note) and "would need" in found[1].reason
    model = nn.Sequential(nn.Linear(60, 60, bias=False), nn.ReLU())
    split(model, ratio=0.5, by=by, form="pivoted")
    assert 0.48 * 3600 < sum(p.numel() for p in model.parameters()) <= 0.5 * 3600


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="rank and energy each fix the rank"):
        Triangular(rank=3, energy=0.5)
    (note,) = split(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), rank=4)
    assert isinstance(note, Note) and note.reason == "rank 4 would need 64 weights, it has 64"
    zero = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
    nn.init.zeros_(zero[0].weight)  # type: ignore[arg-type]
    split(zero, rank=2, by="lu")
    assert not product(zero[0]).any()
