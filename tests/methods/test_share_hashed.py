"""share.hashed: means of buckets, scales of rows, pruned weights, training, files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.errors import RecipeError
from smelt.core.store import store_of
from smelt.core.target import targets
from smelt.forms.hashed import places
from smelt.methods.share.hashed import Hashed


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def buckets(shape: tuple[int, ...], count: int, seed: int, signs: bool = True) -> tuple[Tensor, Tensor]:
    """(which value each weight has, its sign)"""
    at = places(torch.Size(shape), count, seed, signs, torch.device("cpu"))
    return at % count, 1 - 2 * (at >= count).float()


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("shape", [(30, 20), (8, 3, 3, 3), (50,)])
def test_values_are_signed_means(shape: tuple[int, ...], signs: bool) -> None:
    x, codec = noise(*shape), Hashed(share=0.1, signs=signs)
    encoded = codec.encode(x, codec.fit(x, smelt.Stats(seed=7)))
    count = round(0.1 * x.numel())
    which, sign = buckets(shape, count, 7, signs)
    means = [(sign * x)[which == k].mean() if bool((which == k).any()) else torch.tensor(0.0) for k in range(count)]
    torch.testing.assert_close(encoded.parts["values"], torch.stack(means))
    torch.testing.assert_close(encoded.decode(), sign * torch.stack(means)[which])


def test_pruned_weights_do_not_count() -> None:
    x = noise(40, 30)
    where = x.abs() > 0.8
    codec = Hashed(share=0.2)
    values = codec.encode(x, codec.fit(x, smelt.Stats(where, seed=1))).parts["values"]
    count = round(0.2 * int(where.sum()))
    which, sign = buckets((40, 30), count, 1)
    assert isinstance(values, Tensor) and len(values) == count
    for k in range(0, count, 10):
        own = (which == k) & where
        assert values[k] == pytest.approx(float((sign * x)[own].mean()) if own.any() else 0, abs=1e-6)
    model = nn.Sequential(nn.Linear(30, 40))
    result = smelt.compress(model, [{"prune.weights": {"ratio": 0.5}}, "share.hashed"])
    weight = result.model[0].weight
    assert str(store_of(result.model).entries["0.weight"].encoded) == "sparse(values: hashed)"
    assert int((weight == 0).sum()) == 600


def test_a_scale_for_each_row() -> None:
    which, sign = buckets((60, 50), 300, 3)
    shared, scale = noise(300, seed=1), torch.linspace(0.1, 3, 60)
    x = scale[:, None] * sign * shared[which]  # just what the form can hold
    codec = Hashed(share=0.1, rows=True)
    encoded = codec.encode(x, codec.fit(x, smelt.Stats(seed=3)))
    assert float((encoded.decode() - x).norm() / x.norm()) < 1e-3
    plain = Hashed(share=0.1)
    assert float((plain.encode(x, plain.fit(x, smelt.Stats(seed=3))).decode() - x).norm() / x.norm()) > 0.3
    found = encoded.parts["scale"]
    assert isinstance(found, Tensor) and float(found.square().mean()) == pytest.approx(1, rel=0.01)
    half = Hashed(share=0.1, rows=True, scales="float16")
    assert half.encode(x, half.fit(x, smelt.Stats(seed=3))).parts["scale"].dtype is torch.float16


@pytest.mark.parametrize("rows", [True, False])
def test_the_norm_can_be_kept(rows: bool) -> None:
    x, codec = noise(100, 80), Hashed(share=1 / 64, rows=rows, start="norm")
    decoded = codec.encode(x, codec.fit(x, smelt.Stats(seed=3))).decode()
    assert float(decoded.norm()) == pytest.approx(float(x.norm()), rel=1e-4)
    near = Hashed(share=1 / 64, rows=rows)
    assert float(near.encode(x, near.fit(x, smelt.Stats(seed=3))).decode().norm()) < 0.3 * float(x.norm())


def test_what_is_left_alone() -> None:
    model = nn.BatchNorm1d(4)
    reasons = {t.name: Hashed().refuses(t) for t in targets(model)}
    assert "only floating" in str(reasons["num_batches_tracked"])
    assert reasons["weight"] == "its shared values would need 20 bytes, it has 16"
    assert Hashed(rows=True).refuses(targets(nn.Linear(40, 300))[0]) is None
    for settings in ({"share": 0}, {"share": 1e-4}, {"start": "zero"}):
        with pytest.raises(RecipeError, match=next(iter(settings))):
            Hashed(**settings)  # type: ignore[arg-type]


def test_the_file_holds_values_and_no_indices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(500, 64), nn.Flatten(), nn.Linear(256, 300), nn.Linear(300, 10))
    on = ["0.weight", "2.weight"]
    result = smelt.compress(model, [{"share.hashed": {"share": 1 / 32, "on": on}}])
    size = result.save(tmp_path / "small.smelt")
    left = 4 * (300 + 3000 + 10)
    assert size < 4 * (32_000 + 76_800) / 32 + left + 1500
    loaded = smelt.load(tmp_path / "small.smelt", into=nn.Sequential(*model))
    words = torch.arange(8).reshape(2, 4)
    assert torch.equal(loaded(words), result.model(words))
    seeds = {e.encoded.form.seed for e in store_of(loaded).entries.values()}  # type: ignore[attr-defined]
    assert len(seeds) == 2


def test_values_train_and_are_quantized() -> None:
    """A hashed layer learns what it can hold; 4 bits go on top and train, too."""
    torch.manual_seed(0)
    which, sign = buckets((6, 40), 12, 0)
    x = noise(256, 40)
    y = x @ (sign * noise(12, seed=4)[which]).T
    model = smelt.compress(nn.Sequential(nn.Linear(40, 6)), [{"share.hashed": {"share": 0.05}}]).model
    entry = store_of(model).entries["0.weight"]
    form = entry.encoded.form
    same = type(form)(0, True)  # the hash that made the data
    entry.encoded = type(entry.encoded)(same, entry.encoded.parts, entry.encoded.shape, entry.encoded.dtype)
    smelt.core.store.renew(model, targets(model)[0], entry.encoded)

    def train(pieces: list[object], lr: float) -> float:
        with smelt.training(model, pieces, steps=150) as t:
            optimizer = torch.optim.Adam(t.parameters(), lr)
            for _ in range(150):
                loss = (model(x) - y).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                t.step()
        return float(loss.detach() / y.square().mean())

    assert train([], 0.05) < 1e-4
    assert train([{"quantize.affine": {"bits": 4}}], 0.002) < 0.02
    assert str(store_of(model).entries["0.weight"].encoded) == "hashed(values: affine)"


def test_rows_that_say_nothing_do_not_give_huge_values() -> None:
    """Most rows of a layer whose units died are almost 0: what they share has no large value to be stored beside."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 400, bias=False))
    with torch.no_grad():
        net[0].weight[40:] *= 1e-4
    step = {"share.hashed": {"share": 0.125, "rows": True, "start": "norm", "scales": "float16"}}
    made = smelt.compress(net, {"steps": [step]}, smelt.Job(latency=False)).model
    values = dict(store_of(made).entries["0.weight"].encoded.leaves())["values.values"]
    assert float(values.abs().max()) < 5
