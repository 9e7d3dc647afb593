"""Tensors without a model in a file."""

from pathlib import Path

import pytest
import torch

import smelt
from smelt.core.errors import ModelError, OutputError, RecipeError, RuleError

X = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).relu()


def test_what_is_written_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    given = {"features": X, "labels": torch.arange(64), "half": X.bfloat16(), "where": X > 0}
    size = smelt.save_file(given, tmp_path / "a.smelt")
    again = smelt.load_file(tmp_path / "a.smelt")
    assert list(again) == list(given) and all(torch.equal(again[k], v) for k, v in given.items())
    assert size == (tmp_path / "a.smelt").stat().st_size < sum(v.numel() * v.element_size() for v in given.values())
    with smelt.open(tmp_path / "a.smelt") as file:
        assert torch.equal(file.get_slice("features")[3:5], X[3:5])


def test_a_codec_and_its_entropy(tmp_path: Path) -> None:
    """Half of the values are 0, so that 16 levels hold well below 4 bits each: at most 0.1 over their entropy."""
    path, codec = tmp_path / "a.smelt", {"quantize.affine": {"bits": 4, "symmetric": False, "per": "tensor"}}
    size = smelt.save_file({"x": X, "y": torch.arange(64)}, path, codec)
    again = smelt.load_file(path)
    step = float(X.max()) / 15
    assert float((again["x"] - X).abs().max()) <= step / 2 + 1e-5 and torch.equal(again["y"], torch.arange(64))
    share = torch.bincount((X / step).round().long().flatten()).double() / X.numel()
    entropy = -(share[share > 0] * share[share > 0].log2()).sum()
    assert size * 8 / X.numel() < float(entropy) + 0.2 < 3
    assert size < smelt.save_file({"x": X, "y": torch.arange(64)}, tmp_path / "b.smelt", codec, tail=())
    with pytest.raises(OutputError, match="exists"):
        smelt.save_file({"x": X}, path)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.smelt"
    with pytest.raises(RuleError, match=r"not prune\.channels"):
        smelt.save_file({"x": X}, path, "prune.channels")
    with pytest.raises(RuleError, match="nothing but values"):
        smelt.save_file({"x": X}, path, "quantize.gptq")
    with pytest.raises(RecipeError, match="no method"):
        smelt.save_file({"x": X}, path, "quantize.afine")
    with pytest.raises(ModelError, match="tensors by name"):
        smelt.save_file({"x": [1, 2]}, path)  # type: ignore[dict-item]
    assert not path.exists()
