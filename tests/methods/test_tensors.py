"""lowrank.tucker, lowrank.cp and lowrank.tensor_train: the layers that they make."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smelt
from smelt.core.clock import Spread
from smelt.core.edit import Note, Replace, from_plain
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Known
from smelt.core.store import apply_edits, store_of
from smelt.core.target import targets
from smelt.graph import factors
from smelt.grids import cp, trains
from smelt.methods.lowrank.cp import CP
from smelt.methods.lowrank.tensor_train import TensorTrain
from smelt.methods.lowrank.tucker import Tucker
from smelt.train.split import Split


class Holder(nn.Sequential):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def split(act: Split, model: nn.Module, x: torch.Tensor | None = None) -> list[Any]:
    known = Known(batches=None if x is None else [(x, None)])
    edits = act.plan(model, [t for t in targets(model) if t.is_weight], known)
    apply_edits(model, edits, act.name)
    return edits


LAYERS = {
    "conv1d": lambda: nn.Conv1d(12, 14, 5, stride=2, padding=3, dilation=2),
    "conv2d": lambda: nn.Conv2d(12, 14, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2)),
    "no bias": lambda: nn.Conv2d(12, 14, 3, bias=False),
    "one row": lambda: nn.Conv2d(12, 14, (1, 5), padding=(1, 2)),
    "same": lambda: nn.Conv2d(12, 14, (4, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(12, 14, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(12, 14, 3, stride=2, padding=(2, 1), padding_mode="reflect"),
    "circular": lambda: nn.Conv1d(12, 14, 3, padding=2, padding_mode="circular"),
}
ACTS: dict[str, Split] = {
    "tucker": Tucker(rank=(3, 4)),
    "tucker, first only": Tucker(rank=(3, 99)),
    "tucker, last only": Tucker(rank=(99, 4)),
    "tucker, of outputs": Tucker(rank=(3, 4), weight="inputs"),
    "cp": CP(rank=3, penalty=0, rounds=500),
    "cp, joint": CP(rank=3, penalty=0, kernel="joint", rounds=500),
    "cp, of outputs": CP(rank=3, penalty=0, rounds=500, weight="inputs"),
    "tensor train": TensorTrain(rank=4),
    "tensor train, of outputs": TensorTrain(rank=4, weight="inputs"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("way", ACTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_equal_at_full_rank(kind: str, way: str) -> None:
    torch.manual_seed(0)
    model = Holder(LAYERS[kind]()).eval()
    layer = model.layer
    sides = [torch.linalg.qr(torch.randn(max(n, 3), 3, dtype=torch.float64))[0][:n] for n in layer.weight.shape]
    with torch.no_grad():  # three terms: rank 3 in every sense
        layer.weight.copy_(cp.build(sides))
    x = torch.randn(4, 12, *[13, 12][: layer.weight.dim() - 2])
    before, size = model(x).detach(), layer.weight.numel()
    (edit,) = split(ACTS[way], model, x)
    assert isinstance(edit, Replace) and isinstance(model.layer, nn.Sequential)
    assert float((model(x).detach() - before).norm() / before.norm()) < (5e-3 if "cp" in way else 1e-4)
    assert sum(p.numel() for n, p in model.named_parameters() if not n.endswith("bias")) < size
    again = from_plain(json.loads(json.dumps(edit.to_plain())))
    fresh = Holder(LAYERS[kind]()).eval()
    again.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_the_chains_are_those_of_the_papers() -> None:
    made = {}
    for way, act in ACTS.items():
        model = Holder(nn.Conv2d(12, 14, 3, stride=2, padding=1))
        split(act, model, torch.randn(20, 12, 9, 9))
        made[way] = [([*m.weight.shape], m.stride, m.padding, m.groups, m.bias is not None) for m in model.layer]
    one, whole, none = (1, 1), (2, 2), (0, 0)
    first, last = ([3, 12, 1, 1], one, none, 1, False), ([14, 4, 1, 1], one, none, 1, True)
    assert made["tucker"] == [first, ([4, 3, 3, 3], whole, one, 1, False), last]
    assert made["tucker, first only"] == [first, ([14, 3, 3, 3], whole, one, 1, True)]
    assert made["tucker, last only"] == [([4, 12, 3, 3], whole, one, 1, False), last]
    end = ([14, 3, 1, 1], one, none, 1, True)
    tall, wide = ([3, 1, 3, 1], (2, 1), (1, 0), 3, False), ([3, 1, 1, 3], (1, 2), (0, 1), 3, False)
    assert made["cp"] == [first, tall, wide, end]
    assert made["cp, joint"] == [first, ([3, 1, 3, 3], whole, one, 3, False), end]
    assert made["tensor train"] == [
        ([4, 12, 1, 1], one, none, 1, False),
        ([4, 4, 3, 1], (2, 1), (1, 0), 1, False),
        ([4, 4, 1, 3], (1, 2), (0, 1), 1, False),
        last,
    ]


@pytest.mark.parametrize("table", [False, True])
def test_tensor_trains_of_matrices(table: bool) -> None:
    torch.manual_seed(0)
    rows, columns = (4, 3, 3), (4, 4, 2)
    assert (trains.split(36, 3), trains.split(31, 3)) == (rows, columns)
    small = [torch.randn(s, dtype=torch.float64) for s in ((1, 16, 3), (3, 12, 3), (3, 6, 1))]
    weight = trains.from_modes(trains.build(*small), rows, columns, (36, 31)).float()
    model = Holder(nn.Embedding(36, 31) if table else nn.Linear(31, 36))
    with torch.no_grad():
        model.layer.weight.copy_(weight)
    x = torch.randint(0, 36, (4, 5)) if table else torch.randn(4, 5, 31)
    before = model(x)
    (edit,) = split(TensorTrain(rank=6), model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    fresh = Holder(nn.Embedding(36, 31) if table else nn.Linear(31, 36))
    from_plain(json.loads(json.dumps(edit.to_plain()))).apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_padding_stays_zero() -> None:
    model = Holder(nn.Embedding(200, 64, padding_idx=1))
    split(TensorTrain(ratio=0.3), model)
    assert not model(torch.tensor([1])).any()
    model = Holder(nn.Embedding(200, 64, padding_idx=1))
    with torch.no_grad():
        model.layer.weight[1] = 3
    split(TensorTrain(ratio=0.3), model)
    assert bool(model(torch.tensor([1])).any())


@pytest.mark.parametrize("act", [Tucker, CP, TensorTrain])
@pytest.mark.parametrize("ratio", [0.1, 0.3, None])
def test_ratio_is_a_share_of_the_parameters(act: type[Split], ratio: float | None) -> None:
    model = Holder(nn.Conv2d(24, 32, 3))
    split(act(ratio=ratio, **({"rounds": 1} if act is not TensorTrain else {})), model)
    share = sum(m.weight.numel() for m in model.layer) / (24 * 32 * 9)
    assert 0.85 * (ratio or 0.5) < share <= (ratio or 0.5)


@pytest.mark.parametrize("act", [Tucker, CP, TensorTrain])
def test_what_the_layer_gives_is_what_counts(act: type[Split]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16, 7, 7) * torch.logspace(0, -2, 16)[:, None, None]
    errors = {}
    for weight in ("plain", "inputs"):
        torch.manual_seed(1)
        model = Holder(nn.Conv2d(16, 24, 3, padding=1))
        before = model(x)
        split(act(ratio=0.3, weight=weight), model, x)
        errors[weight] = float((model(x) - before).detach().norm() / before.detach().norm())
    assert errors["inputs"] < 0.6 * errors["plain"]


def test_tucker_ranks() -> None:
    torch.manual_seed(0)
    model = Holder(nn.Conv2d(32, 48, 3))
    parts = torch.randn(6, 4, 3, 3), torch.randn(48, 6), torch.randn(32, 4)
    signal = torch.einsum("rskl,or,is->oikl", *parts)
    with torch.no_grad():
        model.layer.weight.copy_(signal + 0.05 * torch.randn(48, 32, 3, 3))
    (target,) = [t for t in targets(model) if t.is_weight]
    w = target.tensor.detach().double()
    assert Tucker(variational=True).ranks(target, w, None) == (4, 6)
    assert Tucker(energy=0.99).ranks(target, w, None) == (4, 6)
    assert Tucker(energy=0.99, multiple=4).ranks(target, w, None) == (4, 4)
    assert Tucker(rank=99).ranks(target, w, None) == (32, 48)
    s, r = Tucker(ratio=0.25).ranks(target, w, None)
    assert r * s * 9 + 48 * r * (r < 48) + 32 * s * (s < 32) <= 0.25 * w.numel() and s >= 4 and r >= 6


def test_tensor_train_tolerance() -> None:
    torch.manual_seed(0)
    model = Holder(nn.Linear(64, 64))
    with torch.no_grad():
        model.layer.weight *= torch.logspace(0, -3, 64)
    weight = model.layer.weight.detach().clone()
    split(TensorTrain(tolerance=0.2), model)
    near = model(torch.eye(64)).detach().T - model.layer.bias.detach()[:, None]
    assert float((weight - near).norm() / weight.norm()) <= 0.2


def test_layers_that_get_slower_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"old": 2.0, "new": 3.0}
    monkeypatch.setattr(
        factors, "latencies", lambda sides, *_: {n: Spread(took[n], took[n], took[n], 1, 1) for n in sides}
    )
    x = torch.randn(2, 16, 8, 8)
    for act in (Tucker(keep="faster"), CP(keep="faster"), TensorTrain(keep="faster")):
        took["new"] = 3.0
        model = Holder(nn.Conv2d(16, 16, 3))
        (note,) = split(act, model, x)
        assert isinstance(note, Note) and "it would take 3 ms in place of 2 ms" in note.reason and "rank" in note.reason
        took["new"] = 1.0
        assert isinstance(split(act, model, x)[0], Replace)
    with pytest.raises(DataError, match="keep: faster"):
        split(CP(keep="faster"), Holder(nn.Conv2d(16, 16, 3)))


def test_layers_that_get_larger_stay() -> None:
    for act, words in (
        (Tucker(rank=15), "rank 15 x 15 would need 2,505 weights, it has 2,304"),
        (CP(rank=99), "rank 99 would need 3,762 weights"),
        (TensorTrain(rank=40), "rank 16 x 40 x 16 would need 3,840 weights"),
    ):
        (note,) = split(act, Holder(nn.Conv2d(16, 16, 3)))
        assert isinstance(note, Note) and words in note.reason


def test_refusals() -> None:
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "point": nn.Conv2d(4, 4, 1),
            "up": nn.ConvTranspose2d(2, 2, 2),
            "full": nn.Linear(5, 5),
        }
    )
    reasons = {
        name: {t.places[0][0]: act.refuses(t) for t in targets(model) if t.is_weight}
        for name, act in (("tucker", Tucker()), ("cp", CP()), ("train", TensorTrain()))
    }
    assert reasons["train"].pop("full") is None
    for found in reasons.values():
        assert "2 groups" in str(found["grouped"]) and "ConvTranspose2d" in str(found["up"])
        assert "take lowrank.svd" in str(found["point"])
    assert "Linear" in str(reasons["cp"]["full"]) and "Linear" in str(reasons["tucker"]["full"])
    for act, settings, words in (
        (Tucker, {"ratio": 0.5, "variational": True}, "ratio and variational each fix the ranks"),
        (Tucker, {"rank": (1, 2, 3)}, "two whole numbers"),
        (Tucker, {"rank": (0, 2)}, "two whole numbers"),
        (CP, {"ratio": 0.5, "rank": 3}, "ratio and rank each"),
        (TensorTrain, {"tolerance": 0.5, "rank": 3}, "rank and tolerance each"),
    ):
        with pytest.raises(RecipeError, match=words):
            act(**settings)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(24 * 9, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.mark.parametrize("step", ["tucker", "cp", "tensor_train"])
def test_quantized_trained_written_and_read(step: str, tmp_path: Path) -> None:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(4))
    job = smelt.Job(data=smelt.Data(train=[(x, y)]), latency=False)
    train = {"train": {"epochs": 15, "lr": 0.003, "keep": "last"}}
    steps = [{f"lowrank.{step}": {"ratio": 0.6, "weight": "inputs"}}, train, {"quantize.affine": {"bits": 8}}]
    result = smelt.compress(small(), steps, job)
    loss = [float(nn.functional.cross_entropy(model(x), y).detach()) for model in (small(), result.model)]
    assert loss[1] < 0.95 * loss[0]
    stored = {n: e.steps for n, e in store_of(result.model).entries.items()}
    assert all(n in stored for n, p in result.model.named_parameters() if p.dim() > 1) and len(stored) > 4
    size = result.save(tmp_path / "a.smelt")
    assert size < 0.25 * sum(p.numel() * 4 for p in small().parameters())
    assert torch.equal(smelt.load(tmp_path / "a.smelt", into=small())(x), result.model(x))
