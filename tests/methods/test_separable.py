from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.edit import Note, Replace
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Known
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.graph.factors import Speed
from smelt.methods.swap.separable import Separable
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
    edits = Separable(**settings).plan(model, [t for t in targets(model) if t.is_weight], known)
    apply_edits(model, edits, "swap.separable")
    return edits


def exact(order: str, shape: torch.Size, m: int) -> Tensor:
    """A random kernel that so many terms of this order give."""
    o, c, *k = shape
    taps = torch.tensor(k).prod().item()
    if order == "depthwise":
        return torch.einsum("ocj,cjk->ock", torch.randn(o, c, m), torch.randn(c, m, taps)).reshape(shape) / 3
    return torch.einsum("ojc,ojk->ock", torch.randn(o, m, c), torch.randn(o, m, taps)).reshape(shape) / 3


def inputs(channels: int, dims: int = 2, n: int = 8) -> Tensor:
    """Images whose channels and pixels go together."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, *[12] * dims, generator=generator)
    x = x + x.roll(1, -1) + x.roll(1, 1)
    return x * torch.linspace(0.2, 2, channels).reshape(-1, *[1] * dims)


LAYERS = {
    "conv1d": lambda: nn.Conv1d(8, 12, 7, stride=2, padding=5, dilation=2),
    "conv2d": lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(1, 2)),
    "no bias": lambda: nn.Conv2d(12, 8, 3, bias=False),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2),
    "reflect": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("order", ["depthwise", "pointwise"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("m", [1, 2])
def test_separable_kernels_are_found_exactly(kind: str, order: str, m: int) -> None:
    model = holder(LAYERS[kind]())
    weight: Any = model[0].weight
    weight.data = exact(order, weight.shape, m)
    x = inputs(weight.shape[1], weight.dim() - 2)
    before = out(model, x)
    (edit,) = swap(model, order=order, multiplier=m, weighted=False)
    assert isinstance(edit, Replace) and len(model[0]) == 2
    assert torch.allclose(out(model, x), before, atol=1e-4 * float(before.abs().max()))


def test_both_finds_few_terms_and_stride_counts() -> None:
    model = holder(nn.Conv2d(8, 12, 3, padding=1, stride=2))
    a, d, b = torch.randn(12, 4), torch.randn(4, 9), torch.randn(4, 8)
    model[0].weight.data = torch.einsum("or,rk,rc->ock", a, d, b).reshape(12, 8, 3, 3)
    x = inputs(8)
    before = out(model, x)
    swap(model, order="both", ratio=4 * (4 * 8 + 9 + 12) / (12 * 8 * 9), weighted=False, turns=2000)
    assert [tuple(layer.weight.shape[:2]) for layer in model[0]] == [(4, 8), (4, 1), (12, 4)]
    assert model[0][0].stride == (1, 1) and model[0][1].stride == (2, 2)
    assert float((out(model, x) - before).norm() / before.norm()) < 0.03
    lengths = [layer.weight.flatten(1 if i < 2 else 0).norm() for i, layer in enumerate(model[0])]
    assert max(lengths) < 10 * min(lengths)


@pytest.mark.parametrize("order", ["depthwise", "pointwise", "both"])
def test_the_error_at_the_output_is_below_that_of_plain_svd(order: str) -> None:
    model = holder(nn.Conv2d(12, 12, 3, padding=1))
    x, weight = inputs(12), model[0].weight.detach().clone()
    before = out(model, x)
    by_channel = weight.flatten(2).transpose(0, 1) if order != "pointwise" else weight.flatten(2)
    u, s, v = torch.linalg.svd(by_channel, full_matrices=False)
    plain = (u[..., :1] * s[:, None, :1]) @ v[:, :1]
    plain = (plain.transpose(0, 1) if order != "pointwise" else plain).reshape(weight.shape)
    limit = float((nn.functional.conv2d(x, weight - plain, padding=1)).square().mean())
    swap(model, x, order=order, multiplier=1, turns=5)
    assert float((out(model, x) - before).square().mean()) < (1.1 if order == "both" else 0.95) * limit


def test_inputs_count_and_auto_takes_the_best() -> None:
    x, found = inputs(16), {}
    for order in ("depthwise", "pointwise", "both", "auto", "blind"):
        model = holder(nn.Conv2d(16, 16, 3))
        before = out(model, x)
        blind = {"order": "depthwise", "weighted": False} if order == "blind" else {"order": order}
        swap(model, x, multiplier=1, **blind)
        found[order] = float((out(model, x) - before).square().mean())
    assert found["auto"] == pytest.approx(min(found.values()))
    assert found["depthwise"] < 0.9 * found["blind"]


def test_one_depthwise_kernel_by_hand() -> None:
    """One input channel of white noise and two taps: the best row is the leading singular vector."""
    model = holder(nn.Conv1d(1, 3, 2, bias=False))
    model[0].weight.data = torch.tensor([[[2.0, 0]], [[0, 1]], [[2, 0]]])
    swap(model, order="depthwise", weighted=False)
    effective = model[0][1].weight[:, :, 0] @ model[0][0].weight[:, 0]
    assert torch.allclose(effective, torch.tensor([[2.0, 0], [0, 0], [2, 0]]), atol=1e-6)


def test_later_layers_make_up_for_earlier_ones() -> None:
    x = inputs(8, n=16)
    make = lambda: holder(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3))  # noqa: E731
    model, plain = make(), make()
    before = out(model, x)
    swap(model, x, order="depthwise", damp=1e-6)
    swap(plain, x, order="depthwise", damp=1e-6)
    alone = make()
    (edit,) = Separable(order="depthwise", damp=1e-6).plan(
        alone, [t for t in targets(alone) if t.name == "2.weight"], Known([(x, None)])
    )
    edit.apply(plain)  # fitted to the inputs before
    errors = [float((out(m, x) - before).square().mean()) for m in (model, plain)]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize(("between", "bias"), [("norm", True), ("relu", True), ("relu", False)])
@pytest.mark.parametrize("order", ["depthwise", "both"])
def test_norms_change_nothing_at_first(between: str, bias: bool, order: str) -> None:
    x = inputs(8, n=32)
    settings: dict[str, Any] = {"order": order, "multiplier": 1}
    make = lambda: holder(nn.Conv2d(8, 12, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(12, 8, 3))  # noqa: E731
    model, bare = make(), make()
    swap(bare, x, **settings)
    swap(model, x, between=between, **settings)
    kinds = [type(layer).__name__ for layer in model[0]]
    norm = ["Conv2d", "BatchNorm2d"]
    last = [*norm, "ReLU", "Conv2d"] if between == "relu" else [*norm, "Conv2d"]
    assert kinds == (last if order == "depthwise" else [*norm, *last])
    loose = 0.05 if between == "relu" else 1e-4
    assert float((out(model, x) - out(bare, x)).norm() / out(bare, x).norm()) < loose
    whole = out(model, x)
    model.train()
    assert float((out(model, x) - whole).norm() / whole.norm()) < loose + 0.01  # the statistics are those of the batch
    model(x).sum().backward()


def test_what_stays_dense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = nn.Conv2d(8, 8, 3)
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "one": nn.Conv2d(8, 8, 1),
            "thin": nn.Conv2d(3, 2, 2),
            "up": nn.ConvTranspose2d(8, 8, 3),
            "tied": tied,
            "twin": tied,
            "free": nn.Conv2d(8, 8, 3),
        }
    )
    method = Separable(multiplier=2, weighted=False)
    weights = [t for t in targets(model) if t.is_weight]
    words = {t.name: method.refuses(t) for t in weights}
    edits = method.plan(model, [t for t in weights if not words[t.name]], Known())
    words |= {e.tensor: e.reason for e in edits if isinstance(e, Note)}
    assert words.pop("free.weight") is None
    parts = ("2 groups", "one tap", "no fewer weights or multiplications than its 24", "ConvTranspose2d", "shared with")
    for (path, reason), part in zip(words.items(), parts, strict=True):
        assert part in str(reason), path
    x = inputs(8)
    monkeypatch.setattr(Speed, "slower", lambda self, edit: "slow" if edit.path == "0" else None)
    model = holder(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    edits = swap(model, x, keep="faster", order="depthwise")
    assert edits[0] == Note("0.weight", "slow") and isinstance(edits[1], Replace)
    with pytest.raises(DataError, match="weigh errors by the inputs"):
        swap(holder(nn.Conv2d(8, 8, 3)))
    with pytest.raises(RecipeError, match="multiplier and ratio each"):
        Separable(multiplier=1, ratio=0.3)
    with pytest.raises(RecipeError, match="before a pointwise layer"):
        Separable(order="pointwise", between="relu")


def test_sizes() -> None:
    def middle(**settings: Any) -> tuple[int, int, int]:
        model = holder(nn.Conv2d(16, 32, 3, stride=2))
        swap(model, weighted=False, order="both", turns=1, **settings)
        return tuple(layer.weight.shape[0] for layer in model[0])  # type: ignore[return-value]

    # dense: 16 * 32 * 9 = 4608; both: r (4 * 16 + 9 + 32) = 105 r for one place of the output
    assert middle(ratio=0.25) == (10, 10, 32)
    assert middle(ratio=0.25, round_to=4) == (8, 8, 32)
    assert middle(multiplier=2) == (12, 12, 32)  # 2 * 16 * (9 + 32) = 1312


def test_moments_are_those_of_the_layer() -> None:
    """The error that is made small is the one at the output."""
    model = holder(nn.Conv2d(6, 6, 3, stride=2, padding=1, dilation=2, bias=False))
    x = inputs(6)
    conv: Any = model[0]
    rows = torch.cat(list(unfolded(conv, x)), 1)[0]
    assert torch.allclose(rows @ conv.weight.flatten(1).T, conv(x).movedim(1, -1).flatten(0, -2), atol=1e-4)


def test_saved_loaded_quantized_and_trained(tmp_path: Path) -> None:
    make = lambda: holder(  # noqa: E731
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(1)
    )
    x = inputs(3, n=16)
    data = smelt.Data(train=[(x, torch.zeros(16, dtype=torch.int64))])
    steps = [
        {"swap.separable": {"on": "3", "between": "norm", "order": "depthwise"}},
        {"train": {"epochs": 1, "lr": 1e-4, "keep": "last", "with": [{"distill.logits": {"alpha": 0.0}}]}},
        {"quantize.affine": {"bits": 8}},
    ]
    model = make()
    found = smelt.compress(model, {"steps": steps}, smelt.Job(data=data, teacher=make(), latency=False))
    found.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=make())
    assert torch.equal(out(loaded, x), out(found.model, x)) and len(loaded.get_submodule("3")) == 3
