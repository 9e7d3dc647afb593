from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.edit import Note, Replace
from smelt.core.errors import DataError, ModelError, RecipeError
from smelt.core.method import Known
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.grids.clusters import together
from smelt.methods.swap.grouped import Grouped
from smelt.models.shuffled import build
from smelt.statistics.gram import unfolded


def holder(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    for layer in layers:
        for p in layer.parameters():
            nn.init.normal_(p, std=0.3)
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def out(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


def swap(model: nn.Module, x: Tensor | None = None, **settings: Any) -> list[Any]:
    known = Known(None if x is None else [(x, None)])
    edits = Grouped(**settings).plan(model, [t for t in targets(model) if t.is_weight], known)
    apply_edits(model, edits, "swap.grouped")
    return edits


def inputs(channels: int, dims: int = 2, n: int = 8) -> Tensor:
    x = torch.randn(n, channels, *[10] * dims, generator=torch.Generator().manual_seed(1))
    return (x + x.roll(1, -1) + x.roll(1, 1)) * torch.linspace(0.2, 2, channels).reshape(-1, *[1] * dims)


LAYERS = {
    "conv1d": lambda: nn.Conv1d(12, 18, 5, stride=2, padding=3, dilation=2),
    "conv2d": lambda: nn.Conv2d(18, 12, 3, stride=(2, 1), padding=1, bias=False),
    "1 x 1": lambda: nn.Conv2d(12, 12, 1),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_groups_under_a_permutation_are_found_exactly(kind: str, weighted: bool) -> None:
    model = holder(LAYERS[kind]())
    weight: Any = model[0].weight
    o, c = weight.shape[:2]
    same = (torch.randperm(o) % 3)[:, None] == (torch.randperm(c) % 3)
    weight.data *= same.reshape(o, c, *[1] * (weight.dim() - 2))
    x = inputs(c, weight.dim() - 2)
    before, bias = out(model, x), model[0].bias is not None
    (edit,) = swap(model, x if weighted else None, groups=3, weighted=weighted)
    assert isinstance(edit, Replace) and edit.builder == "shuffled"
    assert [type(m).__name__ for m in model[0]] == ["Shuffle", type(LAYERS[kind]()).__name__, "Shuffle"]
    assert model[0][1].groups == 3 and (model[0][1].bias is not None) == bias
    assert torch.allclose(out(model, x), before, atol=1e-4)


def test_channels_in_order_need_no_shuffle() -> None:
    model = holder(nn.Conv2d(4, 4, 3))
    model[0].weight.data *= torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))[:, :, None, None]
    (edit,) = swap(model, groups=2, weighted=False)
    assert edit.builder == "chain" and len(model[0]) == 1


def test_the_best_groups_of_a_small_matrix() -> None:
    for seed in range(5):
        e = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = 0.0
        for a in combinations(range(6), 3):
            for b in combinations(range(6), 3):
                inside = torch.zeros(6, 6, dtype=torch.bool)
                rest_a, rest_b = (sorted({*range(6)} - {*s}) for s in (a, b))
                inside[torch.tensor(a)[:, None], torch.tensor(b)] = True
                inside[torch.tensor(rest_a)[:, None], torch.tensor(rest_b)] = True
                best = max(best, float(e[inside].sum()))
        rows, columns = together(e, 2, starts=200)
        assert rows.bincount().tolist() == columns.bincount().tolist() == [3, 3]
        assert float(e[rows[:, None] == columns].sum()) == pytest.approx(best)


def test_kernels_are_the_least_squares_solution() -> None:
    model = holder(nn.Conv2d(6, 4, 3, padding=1, bias=False))
    x = inputs(6)
    conv: Any = model[0]
    rows, y = torch.cat(list(unfolded(conv, x)), 1)[0].double(), out(model, x)
    (edit,) = swap(model, x, groups=2, damp=0.0)
    first = edit.arguments.get("before", list(range(6)))[:3]
    seen = rows.reshape(len(rows), 6, 9)[:, first].flatten(1)
    back = edit.arguments.get("after", list(range(4)))
    ours = edit.values["1.weight" if "before" in edit.arguments else "0.weight"]
    for o in range(4):
        if back[o] < 2:
            expected = torch.linalg.lstsq(seen, y[:, o].reshape(-1, 1).double()).solution[:, 0]
            assert torch.allclose(ours[back[o]].flatten().double(), expected, atol=1e-3)


def test_a_pointwise_layer_lowers_the_error() -> None:
    x, found = inputs(16), {}
    for name, settings in {
        "groups": {},
        "blind": {"weighted": False},
        "mixed": {"pointwise": True},
    }.items():
        model = holder(nn.Conv2d(16, 16, 3))
        before = out(model, x)
        swap(model, x, groups=4, **settings)
        found[name] = float((out(model, x) - before).square().mean())
    assert found["mixed"] < 0.8 * found["groups"] < 0.8 * found["blind"]
    assert [type(m).__name__ for m in model[0]] == ["Shuffle", "Conv2d", "Conv2d"]


def test_what_stays_dense_is_named() -> None:
    model = nn.ModuleDict(
        {
            "odd": nn.Conv2d(6, 8, 3),
            "odder": nn.Conv2d(8, 6, 3),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "up": nn.ConvTranspose2d(8, 8, 3),
            "one": nn.Conv2d(8, 8, 1),
            "free": nn.Conv2d(8, 8, 3),
        }
    )
    method = Grouped(pointwise=True, weighted=False)
    weights = [t for t in targets(model) if t.is_weight]
    words = {t.name: method.refuses(t) for t in weights}
    edits = method.plan(model, [t for t in weights if not words[t.name]], Known())
    words |= {e.tensor: e.reason for e in edits if isinstance(e, Note)}
    assert words.pop("free.weight") is None
    parts = ("6 inputs do not divide into 4", "6 outputs do not", "2 groups", "ConvTranspose2d", "need 80 weights")
    for (path, reason), part in zip(words.items(), parts, strict=True):
        assert part in str(reason), path
    with pytest.raises(DataError, match="weigh errors by the inputs"):
        swap(holder(nn.Conv2d(8, 8, 3)))
    with pytest.raises(RecipeError, match="groups"):
        Grouped(groups=1)


@pytest.mark.parametrize("order", ["abc", [0, 0], [1, 2], [0, 1.0], [True, False], 3])
def test_orders_from_a_file_are_checked(order: Any) -> None:
    with pytest.raises(ModelError, match="shuffled: before"):
        build([["ReLU", {}]], before=order)


def test_saved_loaded_quantized_and_trained(tmp_path: Path) -> None:
    make = lambda: holder(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(1))  # noqa: E731
    x = inputs(4, n=16)
    data = smelt.Data(train=[(x, torch.zeros(16, dtype=torch.int64))])
    steps = [
        {"swap.grouped": {"on": "2", "groups": 2}},
        {"train": {"epochs": 1, "lr": 1e-4, "keep": "last", "with": [{"distill.logits": {"alpha": 0.0}}]}},
        {"quantize.affine": {"bits": 8}},
    ]
    found = smelt.compress(make(), {"steps": steps}, smelt.Job(data=data, teacher=make(), latency=False))
    found.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=make())
    assert torch.equal(out(loaded, x), out(found.model, x)) and not torch.equal(out(loaded, x), out(make(), x))
