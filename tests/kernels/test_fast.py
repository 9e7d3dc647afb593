"""`smelt.fast` takes what was faster, keeps what it measured, and changes nothing else; so does the format 'torch'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.errors import DataError, FileError, ModelError
from smelt.core.kernel import Served
from smelt.core.store import store_of
from smelt.formats.smelt import save_again
from smelt.kernels import _fast
from smelt.kernels._fast import verdicts
from smelt.kernels._verdicts import Verdicts, folder
from smelt.models import chain
from smelt.native import matvec

pytestmark = pytest.mark.skipif(matvec.functions() is None, reason="the C library is not built")

LAYERS: list[Any] = [
    ["Linear", {"in_features": 64, "out_features": 48}],
    ["ReLU", {}],
    ["Linear", {"in_features": 48, "out_features": 32}],
    ["ReLU", {}],
    ["Linear", {"in_features": 32, "out_features": 10}],
]
RECIPE: list[Any] = [
    {"quantize.affine": {"bits": 4, "per": "group", "group": 16, "on": "0"}},
    {"quantize.affine": {"bits": 8, "on": "2"}},
    {"quantize.affine": {"bits": 8, "at": "input", "on": "2"}},
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    source = smelt.Source.of(chain.build(LAYERS), "chain", {"layers": LAYERS})
    return smelt.compress(source, RECIPE, smelt.Job(latency=False)).model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels.json"


def clock(monkeypatch: pytest.MonkeyPatch, **taken: float) -> list[list[str]]:
    """Kernels take these times, dense layers 1; what was timed is listed."""
    seen: list[list[str]] = []

    def times(layer: Any, able: Any, shape: torch.Size) -> dict[str, float]:
        seen.append(sorted(able))
        slow = 10.0 if shape.numel() > 4 * layer.shape[-1] else 1.0
        return {"dense": 1.0, **{name: slow * taken.get(name, 2.0) for name in able}}

    monkeypatch.setattr(_fast, "_times", times)
    return seen


def near(found: Tensor, wanted: Tensor) -> None:
    found, wanted = found.detach(), wanted.detach()
    assert float((found - wanted).abs().max()) <= 2e-3 * float(wanted.abs().max())


def test_the_fastest_serves(model: nn.Module, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    seen = clock(monkeypatch, affine_matvec=0.5, int8_matvec=0.4, int8_linear=0.6)
    x = torch.randn(1, 64)
    quick = smelt.fast(model, x)
    found = verdicts(quick)
    assert {path: v.kernel for path, v in found.items()} == {"0": "affine_matvec", "2": "int8_matvec"}
    assert found["0"].most == 4 and found["2"].milliseconds["int8_linear"] == 0.6
    assert isinstance(quick[0], Served) and isinstance(quick[2], Served) and type(quick[4]) is nn.Linear  # type: ignore[index]
    near(quick(x), model(x))
    near(quick(torch.randn(9, 64) * 0 + x), model(x).expand(9, -1))  # more samples than `most`
    assert quick[4].weight is model[4].weight and type(model[0]) is nn.Linear  # type: ignore[index]
    assert not store_of(quick).entries and not store_of(quick).activations  # nothing is simulated any more
    assert len(store_of(model).entries) == 2 and len(store_of(model).activations) == 1
    timed = len(seen)
    again = smelt.fast(model, x)
    assert len(seen) == timed and verdicts(again) == found and torch.equal(again(x), quick(x))
    assert len(json.loads(own_cache.read_text())) == 2
    smelt.fast(model, torch.randn(2, 64))  # another shape is measured anew
    assert len(seen) > timed


def test_what_is_not_faster_stays_dense(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, affine_matvec=0.99, int8_matvec=1.5, int8_linear=1.0)
    x = torch.randn(1, 64)
    quick = smelt.fast(model, x)
    assert {v.kernel for v in verdicts(quick).values()} == {None}
    assert torch.equal(quick(x), model(x)) and len(store_of(quick).entries) == 2


def test_a_codec_that_no_kernel_takes_stays(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, affine_matvec=0.1)
    x = torch.randn(1, 64)
    quick = smelt.fast(model, x)
    assert {v.kernel for v in verdicts(quick).values()} == {"affine_matvec"}
    assert len(store_of(quick).activations) == 1 and len(quick[2]._forward_pre_hooks) == 1  # type: ignore[index]
    near(quick(x), model(x))


def test_rounding_must_be_allowed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = clock(monkeypatch)
    smelt.fast(model, torch.randn(1, 64))
    smelt.fast(model, torch.randn(1, 64), rounds=True)
    grouped = ["affine_matvec", "table_matvec"]
    assert seen[0] in (grouped, ["affine_matvec"]) and "int8_matvec" in seen[1]


def test_real_times(model: nn.Module) -> None:
    x = torch.randn(1, 64)
    near(smelt.fast(model, x)(x), model(x))


class Peeking(nn.Module):
    """Looks at its layer's weight, and holds one of torch's own modules that look into theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.layer(x.to(self.layer.weight.dtype)))  # type: ignore[no-any-return]


def test_modules_that_look_at_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    net = smelt.compress(Peeking(), [{"quantize.affine": {"bits": 8}}], smelt.Job(latency=False)).model
    clock(monkeypatch, affine_matvec=0.1)
    x = torch.randn(1, 3, 16)
    quick = smelt.fast(net, x)
    assert list(verdicts(quick)) == ["layer"]
    near(quick(x), net(x))


def test_a_model_that_fails_is_named(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="on the example"):
        smelt.fast(model, torch.randn(1, 63))


def test_a_damaged_cache_counts_as_empty(tmp_path: Path) -> None:
    assert folder() == tmp_path / "cache"
    path = tmp_path / "k.json"
    for text in ("{", "[]", '{"a": 1}', '{"a": {"kernel": 3}}', '{"a": {"kernel": null, "most": 0}}'):
        path.write_text(text)
        assert Verdicts(path).known == {}
    blocked = Verdicts(path / "inside")  # cannot be written
    blocked.keep("a", _fast.Verdict(None))
    assert blocked.known == {"a": _fast.Verdict(None)}


def test_the_format(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    seen = clock(monkeypatch, affine_matvec=0.5, int8_matvec=0.4)
    x = torch.randn(1, 64)
    path = tmp_path / "fast.smelt"
    done = smelt.export(model, "torch", path, example=x)
    assert done.bytes == path.stat().st_size < 4 * sum(p.numel() for p in model.parameters())
    assert done.notes == ("1 layer(s) run as affine_matvec", "1 layer(s) run as int8_matvec")
    assert not list(tmp_path.glob("*.part"))
    own_cache.unlink()
    timed = len(seen)
    quick = smelt.load_fast(path)
    assert len(seen) == timed  # what the file says is enough on the machine that wrote it
    assert [v.kernel for v in verdicts(quick).values()] == ["affine_matvec", "int8_matvec"]
    near(quick(x), model(x))
    assert torch.equal(smelt.load(path)(x), model(x))  # an ordinary file otherwise
    monkeypatch.setattr("smelt.kernels._verdicts.machine", lambda device: "another")
    near(smelt.load_fast(path)(x), model(x))
    assert len(seen) > timed


def test_what_the_format_refuses(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    with pytest.raises(DataError, match="for which kernels are timed"):
        smelt.export(model, "torch", tmp_path / "a.smelt")
    plain, path, bad = (tmp_path / name for name in ("plain.smelt", "good.smelt", "bad.smelt"))
    smelt.save(model, plain)
    with pytest.raises(FileError, match="says nothing of kernels"):
        smelt.load_fast(plain)
    smelt.export(model, "torch", path, example=torch.randn(1, 64))
    good = {"rounds": False, "shapes": {"0": [1, 64]}, "verdicts": {}}
    wrong: list[dict[str, Any]] = [
        {"rounds": 1},
        {"shapes": []},
        {"shapes": {"0": [1, -64]}},
        {"shapes": {"0": [1 << 20, 1 << 20]}},
        {"shapes": {"0": [1, 63]}},
        {"shapes": {"9": [1, 64]}},
        {"verdicts": {"a": {"kernel": "x", "milliseconds": 3}}},
    ]
    for change in wrong:
        save_again(path, bad, kernels={**good, **change})
        with pytest.raises(FileError, match=r"bad\.smelt"):
            smelt.load_fast(bad)
        bad.unlink()
    unknown = {"a": {"kernel": "none_such", "milliseconds": {"dense": 1.0}, "most": None}}
    save_again(path, bad, kernels={**good, "verdicts": unknown})
    x = torch.randn(1, 64)
    assert torch.equal(smelt.load_fast(bad)(x), model(x))
