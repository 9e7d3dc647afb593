"""share.kmeans: what it leaves alone, what it weighs, what a bit costs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import smelt
from smelt.core.errors import DataError, RecipeError, RuleError
from smelt.core.store import pack, rest_bytes, store_of
from smelt.core.target import targets
from smelt.grids import kmeans
from smelt.methods.share.kmeans import KMeans


def refuses(x: torch.Tensor, **settings: object) -> str | None:
    model = nn.Module()
    model.x = nn.Parameter(x)
    return KMeans(**settings).refuses(targets(model)[0])  # type: ignore[arg-type]


def test_small_tensors_that_would_grow_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 64))
    result = smelt.compress(model, [{"share.kmeans": {"clusters": 8, "on": "*.bias"}}])
    assert list(store_of(result.model).entries) == ["1.bias"]
    notes = result.report.notes
    assert any(
        "leaves 0.bias [10] alone: 8 shared values with their indices need 58 bytes, it has 40" in n for n in notes
    )
    with pytest.raises(RuleError, match="finds nothing to act on"):
        smelt.compress(nn.Sequential(nn.Linear(64, 10)), [KMeans(clusters=8), {"share.kmeans": {"on": "*.bias"}}])


@pytest.mark.parametrize("n", [1, 10, 16, 17, 40, 300, 5000])
@pytest.mark.parametrize("clusters", [2, 8, 300, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_stored_is_smaller(n: int, clusters: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    if refuses(x, clusters=clusters) is None:
        codec = KMeans(clusters=clusters, start="quantiles")
        tail = [smelt.make("code.bits")]
        assert rest_bytes(pack(codec.encode(x, codec.fit(x, smelt.Stats())), tail)) < rest_bytes(x)


def test_few_distinct_values_count() -> None:
    assert refuses(torch.zeros(40), clusters=256) is None
    assert "need" in str(refuses(torch.arange(40.0), clusters=256))
    assert refuses(torch.arange(40.0), clusters=4) is None


def bits(indices: torch.Tensor) -> float:
    share = indices.flatten().bincount().double() / indices.numel()
    return float(-(share[share > 0] * share[share > 0].log2()).sum())


def heavy(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_t(5, shape).astype(np.float32))


def test_by_default_nothing_is_asked_or_added() -> None:
    x = heavy(30, 40)
    state = KMeans().fit(x, smelt.Stats())
    assert KMeans().needs_at("weight") == () and KMeans(rate=1.0).needs_at("weight") == ()
    assert dict(state.named_buffers()).keys() == {"codebook"}
    assert state.codebook.tolist() == torch.from_numpy(kmeans.optimal(x.numpy(), 16)).float().tolist()
    assert torch.equal(KMeans().encode(x, state).decode(), KMeans(rate=0.0).encode(x, state).decode())


def test_a_rate_takes_bits_off() -> None:
    x = heavy(100, 50)
    last, error = 4.0, 0.0
    for rate in (0.0, 1.0, 3.0, 10.0):
        codec = KMeans(rate=rate)
        encoded = codec.encode(x, codec.fit(x, smelt.Stats()))
        spent, lost = bits(encoded.parts["indices"]), float((encoded.decode() - x).square().sum())
        assert spent < last and lost > error
        last, error = spent, lost
    sizes = [
        rest_bytes(pack(codec.encode(x, codec.fit(x, smelt.Stats())), [smelt.make("code.huffman")]))
        for codec in (KMeans(), KMeans(rate=3.0))
    ]
    assert sizes[1] < 0.8 * sizes[0]


def test_a_rate_goes_with_masks_and_narrow_codebooks() -> None:
    x = heavy(64, 64)
    where = x.abs() > 0.5
    codec = KMeans(rate=2.0, clusters=64, codebook="bfloat16")
    state = codec.fit(x, smelt.Stats(where=where))
    centers, borders = kmeans.constrained(x[where].numpy(), 64, 2.0)
    assert state.codebook.dtype == torch.bfloat16 and state.borders.tolist() == borders.tolist()
    encoded = codec.encode(x, state)
    assert encoded.parts["indices"][~where].max() == 0
    expected = torch.from_numpy(centers)[torch.from_numpy(np.searchsorted(borders, x[where].double().numpy()))]
    assert torch.equal(encoded.decode()[where], expected.bfloat16())
    close = 1 + torch.arange(512.0).reshape(16, 32) / 4096  # centers that are one in bfloat16
    state = codec.fit(close, smelt.Stats())
    assert len(state.codebook) == len(state.borders) + 1 < 64
    assert float((codec.encode(close, state).decode().float() - close).abs().max()) < 2**-7
    nothing = codec.fit(x, smelt.Stats(where=torch.zeros_like(where)))
    assert nothing.codebook.tolist() == [0] and codec.encode(x, nothing).decode().abs().max() == 0
    with pytest.raises(RecipeError, match="rate goes with start: exact, not with start: line"):
        KMeans(rate=1.0, start="line")


@pytest.mark.parametrize("settings", [{}, {"rate": 1.0}, {"start": "quantiles"}])
def test_weights_that_meet_large_inputs_are_kept_better(settings: dict[str, object]) -> None:
    x = heavy(40, 30)
    moment = torch.logspace(-3, 3, 30, dtype=torch.float64)
    stats = smelt.Stats(gathered={"second_moment": moment})
    errors = []
    for weighted in (False, True):
        codec = KMeans(weighted=weighted, clusters=8, **settings)  # type: ignore[arg-type]
        encoded = codec.encode(x, codec.fit(x, stats))
        errors.append(float((moment * (encoded.decode() - x).double().square()).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_weighted_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [8.0, 9.0]])
    stats = smelt.Stats(gathered={"second_moment": torch.tensor([3.0, 1.0], dtype=torch.float64)})
    codec = KMeans(weighted=True, clusters=2)
    assert codec.fit(x, stats).codebook.tolist() == [0.25, 8.25]
    masked = smelt.Stats(torch.tensor([[True, True], [False, True]]), stats.gathered)
    assert codec.fit(x, masked).codebook.tolist() == [0.25, 9]
    dead = smelt.Stats(gathered={"second_moment": torch.zeros(2, dtype=torch.float64)})
    assert codec.fit(x, dead).codebook.tolist() == [0.5, 8.5]
    with pytest.raises(RuleError, match="no second moment was gathered"):
        codec.fit(x, smelt.Stats())


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(50, 8), nn.Conv1d(8, 16, 3, groups=2, bias=False)
        self.up, self.out = nn.ConvTranspose1d(16, 8, 2), nn.Linear(8, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.conv(self.embed(x).transpose(1, 2)))
        return self.out(h.transpose(1, 2))


def test_weighted_from_end_to_end(tmp_path: Path) -> None:
    model, batch = Mixed().eval(), torch.randint(0, 50, (6, 12), generator=torch.Generator().manual_seed(1))
    data = smelt.Data(train=[(batch, None)])
    step = {"share.kmeans": {"clusters": 4, "weighted": True, "rate": 0.5}}
    result = smelt.compress(model, [step], smelt.Job(data=data, latency=False))
    assert set(store_of(result.model).entries) == {"conv.weight", "up.weight", "out.weight"}
    assert any("leaves embed.weight" in n and "linear layers and convolutions" in n for n in result.report.notes)
    result.save(tmp_path / "a.smelt")
    assert torch.equal(smelt.load(tmp_path / "a.smelt", into=Mixed())(batch), result.model(batch))
    with pytest.raises(DataError, match="needs data to gather statistics from"):
        smelt.compress(model, [step])
    assert "linear layers" in str(refuses(torch.randn(100, 100), weighted=True))


def test_a_rate_inside_training() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(64, 16)
    piece = {"share.kmeans": {"clusters": 16, "rate": {"ramp": [0.0, 4.0]}, "weighted": True}}
    with smelt.training(model, [piece], steps=8, calibration=[(x, None)]) as t:
        optimizer = torch.optim.Adam(t.parameters(), 1e-2)
        for _ in range(8):
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            t.step()
    entries = store_of(model).entries
    assert len(entries) == 2
    assert all(bits(e.encoded.parts["indices"]) < 3.4 for e in entries.values())
