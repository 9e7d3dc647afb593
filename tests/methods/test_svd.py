import json
from typing import Any

import pytest
import torch
from torch import nn

import smelt
from smelt.core.edit import Note, Replace, from_plain
from smelt.core.errors import RecipeError
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.methods.lowrank.svd import SVD


class Holder(nn.Sequential):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def split(model: nn.Module, **settings: Any) -> list[Any]:
    edits = SVD(**settings).plan(model, [t for t in targets(model) if t.is_weight], {})
    apply_edits(model, edits, "lowrank.svd")
    return edits


def thin(weight: torch.Tensor, rank: int, spatial: bool = False) -> torch.Tensor:
    """A random weight of this rank in the layout that the scheme splits."""
    o, i, *k = weight.shape
    m, n = (i * k[0], o * k[1]) if spatial else (o, weight[0].numel())
    matrix = torch.randn(m, rank) @ torch.randn(rank, n) / 10
    return matrix.reshape(i, k[0], o, k[1]).permute(2, 0, 1, 3) if spatial else matrix.reshape(weight.shape)


LAYERS = {
    "linear": lambda: nn.Linear(20, 30),
    "no bias": lambda: nn.Linear(20, 30, bias=False),
    "conv1d": lambda: nn.Conv1d(8, 12, 5, stride=2, padding=3, dilation=2),
    "conv2d": lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2)),
    "1 x 1": lambda: nn.Conv2d(16, 20, 1, bias=False),
    "same": lambda: nn.Conv2d(8, 12, (4, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(8, 12, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=(2, 1), padding_mode="reflect"),
    "circular": lambda: nn.Conv1d(8, 12, 3, padding=2, padding_mode="circular"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_equal_at_full_rank(kind: str, scheme: str) -> None:
    torch.manual_seed(0)
    model = Holder(LAYERS[kind]()).eval()
    layer = model.layer
    with torch.no_grad():
        layer.weight.copy_(thin(layer.weight, 4, scheme == "spatial" and layer.weight.dim() == 4))
    x = torch.randn(2, *{2: (20,), 3: (8, 30), 4: (layer.weight.shape[1], 11, 12)}[layer.weight.dim()])
    before, size = model(x), layer.weight.numel()
    (edit,) = split(model, rank=4, scheme=scheme)
    assert isinstance(edit, Replace) and isinstance(model.layer, nn.Sequential)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-4)
    assert model.layer[0].weight.numel() + model.layer[1].weight.numel() < size
    assert not model.layer.training
    again = from_plain(json.loads(json.dumps(edit.to_plain())))
    fresh = Holder(LAYERS[kind]())
    again.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_eckart_young(rank: int) -> None:
    torch.manual_seed(0)
    model = Holder(nn.Linear(40, 60))
    weight = model.layer.weight.detach().clone()
    split(model, rank=rank)
    error = (weight - model.layer[1].weight @ model.layer[0].weight).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[rank:].norm())


def test_by_hand() -> None:
    model = Holder(nn.Linear(4, 4))
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    with torch.no_grad():
        model.layer.weight.copy_(weight)
    split(model, energy=0.5)  # 16 of 30
    assert [m.weight.abs().amax().item() for m in model.layer] == pytest.approx([2, 2])  # sqrt(4) on either side
    assert (model.layer[1].weight @ model.layer[0].weight)[0, 0].item() == pytest.approx(4)
    model = Holder(nn.Linear(4, 4))
    with torch.no_grad():
        model.layer.weight.copy_(weight)
    (note,) = split(model, energy=0.83)  # 25 of 30
    assert isinstance(note, Note) and note.reason == "rank 2 would need 16 weights, it has 16"


def test_ratio_is_a_share_of_the_parameters() -> None:
    for ratio in (0.1, 0.25, None):
        model = Holder(nn.Conv2d(32, 64, 3))
        split(model, ratio=ratio)
        share = sum(m.weight.numel() for m in model.layer) / (32 * 64 * 9)
        assert (ratio or 0.5) - 0.02 < share <= (ratio or 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    model = Holder(nn.Linear(40, 60)).to(dtype)
    split(model, rank=3)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.zeros(1, 40, dtype=dtype)).dtype == dtype


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="ratio and rank each fix the rank"):
        SVD(ratio=0.5, rank=3)
    hooked, tied = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "table": nn.Embedding(5, 4, max_norm=1.0),
            "up": nn.ConvTranspose2d(2, 2, 2),
            "hooked": hooked,
            "tied": tied,
            "twin": tied,
            "free": nn.Linear(9, 9),
        }
    )
    words = {t.places[0][0]: SVD().refuses(t) for t in targets(model) if t.is_weight}
    assert words.pop("free") is None
    for (path, reason), part in zip(
        words.items(),
        ("2 groups", "a norm of 1.0", "ConvTranspose2d", "a hook", "shared with twin.weight"),
        strict=True,
    ):
        assert part in str(reason), path
    assert "whole model" in str(SVD().refuses(targets(nn.Linear(3, 3))[0]))
    assert "of a linear" in str(SVD().refuses({t.name: t for t in targets(model)}["free.bias"]))


def test_in_a_recipe(model: nn.Sequential, job: smelt.Job) -> None:
    result = smelt.compress(model, [{"lowrank.svd": {"rank": 20}}], job)
    assert result.report.value("parameters") < result.report.value("parameters", 0)
    assert any("leaves 0.weight" in note and "would need" in note for note in result.report.notes)


class Borrowing(nn.Module):
    """Uses one layer's weight past the layer itself."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"f": nn.Linear(20, 30), "free": nn.Linear(30, 20)})
        self.outer = nn.Linear(20, 30)
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner["free"](nn.functional.linear(x, self.inner["f"].weight))
        return self.outer(x)


class Branching(nn.Module):
    """Cannot be traced; what it holds can."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Borrowing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) if x.sum() > 0 else self.part(-x)


@pytest.mark.parametrize(("model", "path"), [(Borrowing(), ""), (Branching(), "part.")])
def test_weights_that_others_read_are_left_alone(model: nn.Module, path: str) -> None:
    edits = {getattr(e, "tensor", None) or getattr(e, "path", None): e for e in split(model, rank=2)}
    note = edits[f"{path}inner.f.weight"]
    assert isinstance(note, Note) and "reads its weights" in note.reason
    assert isinstance(edits[f"{path}inner.free"], Replace) and isinstance(edits[f"{path}outer"], Replace)
    assert model(torch.ones(3, 20)).shape == (3, 30)


def test_transformers_still_run() -> None:
    make = {"d_model": 16, "nhead": 2, "dim_feedforward": 64, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**make), 2, enable_nested_tensor=False)
    model = nn.ModuleDict({"encoder": encoder, "decoder": nn.TransformerDecoderLayer(**make)}).eval()
    notes = {e.tensor: e.reason for e in split(model, rank=3) if isinstance(e, Note)}
    for name in ("linear1", "linear2"):
        assert "TransformerEncoderLayer around it" in notes[f"encoder.layers.1.{name}.weight"]
        assert isinstance(model["decoder"].get_submodule(name), nn.Sequential)
    assert "encoder.layers.0.self_attn.out_proj.weight" in notes
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # the fast path of the encoder, which reads the weights
        assert model["decoder"](x, model["encoder"](x)).shape == x.shape


def test_attention_reads_its_projection() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}).eval()
    model["a"].out_proj = nn.Linear(16, 16)
    (note,) = [e for e in split(model, rank=2) if e.tensor == "a.out_proj.weight"]
    assert isinstance(note, Note) and "MultiheadAttention around it" in note.reason
    assert model["a"](*[torch.zeros(3, 1, 16)] * 3)[0].shape == (3, 1, 16)
