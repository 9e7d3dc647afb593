"""Packed layers of compressed-tensors, unpacked here bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smelt.core.errors import RecipeError
from smelt.core.export import export
from smelt.core.store import store_of
from smelt.formats.compressed_tensors import packed
from tests.formats._decoder import decoder, source, stored

Q = "model.layers.0.self_attn.q_proj"


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """Code by code: the low bits of a word first, less half the range."""
    rows = []
    for row in words.tolist():
        number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(row))
        rows.append([(number >> bits * i & (1 << bits) - 1) - (1 << bits - 1) for i in range(columns)])
    return torch.tensor(rows)


def written(tmp_path: Path, model: nn.Module, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    given = source(tmp_path / "in", decoder())
    made = export(model, "compressed-tensors", tmp_path / "out", source=given, **settings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    return load_file(tmp_path / "out" / "model.safetensors"), config.get("quantization_config"), made


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32, 48])
def test_codes_are_the_stored_ones(tmp_path: Path, bits: int, symmetric: bool, group: int) -> None:
    settings = {"per": "group", "group": group} if group else {}
    settings |= {"zero": "whole"} if not symmetric else {}
    model = stored(decoder(), {"quantize.affine": {"bits": bits, "symmetric": symmetric, "on": "model.*", **settings}})
    found, config, made = written(tmp_path, model)
    wide = 4 if bits <= 4 else 8
    run = {0: 64, 32: 32, 48: 16}[group]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["symmetric"], weights["type"]) == (wide, symmetric, "int")
    assert weights["strategy"] == ("group" if group else "channel")
    tree = store_of(model).entries[f"{Q}.weight"].encoded
    half = 0 if symmetric else 1 << wide - 1
    codes = unpacked(found[f"{Q}.weight_packed"], wide, 64)
    assert torch.equal(codes, tree.parts["codes"].long() - half)  # type: ignore[union-attr]
    assert found[f"{Q}.weight_shape"].tolist() == [64, 64] and f"{Q}.weight" not in found
    scale = found[f"{Q}.weight_scale"]
    assert scale.shape == (64, 64 // run)
    if not symmetric:
        zero = unpacked(found[f"{Q}.weight_zero_point"].T, wide, 64).T
        assert zero.shape == scale.shape
        codes = codes - zero.repeat_interleave(run, 1)
    again = codes * scale.repeat_interleave(run, 1)
    assert torch.equal(again, model.state_dict()[f"{Q}.weight"])
    assert config["format"] == "pack-quantized" and config["quantization_status"] == "compressed"
    assert "1 stored tensors are written dense: they are no weights of linear layers" in made.notes


def test_groups_and_what_is_left_dense(tmp_path: Path) -> None:
    steps: list[Any] = [{"quantize.affine": {"bits": 8, "on": "*.mlp.*"}}]
    steps.append({"quantize.affine": {"bits": 4, "per": "group", "group": 32, "on": ["*.q_proj", "*.k_proj"]}})
    steps.append({"quantize.affine": {"bits": 4, "symmetric": False, "on": "*.v_proj"}})
    steps.append({"share.kmeans": {"on": "*.o_proj"}})
    found, config, made = written(tmp_path, stored(decoder(), *steps), dtype="float16")
    groups = config["config_groups"]
    assert [len(group["targets"]) for group in groups.values()] == [6, 9]
    assert groups["group_0"]["weights"]["group_size"] == 32 and groups["group_1"]["weights"]["group_size"] is None
    dense = [f"model.layers.{i}.self_attn.{k}_proj" for i in range(3) for k in "vo"]
    assert set(config["ignore"]) == {"lm_head", *dense} and all(found[f"{n}.weight"].dim() == 2 for n in dense)
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float16}
    assert len(made.notes) == 2 and any("zero points are no codes" in n for n in made.notes)
    assert any("stored as codebook" in n for n in made.notes)


def test_inputs_in_8_bits(tmp_path: Path) -> None:
    at = {"bits": 8, "at": "input"}
    steps: list[Any] = [{"quantize.affine": {"bits": 8, "on": "*_proj"}}]
    steps.append({"quantize.affine": {**at, "symmetric": True, "per": "token", "on": "*.mlp.*"}})
    steps.append({"quantize.affine": {**at, "on": "*.q_proj"}})
    model = stored(decoder(), *steps)
    found, config, made = written(tmp_path, model)
    assert config["format"] == "mixed-precision" and not made.notes
    kinds = {group["format"]: group["input_activations"] for group in config["config_groups"].values()}
    assert kinds["pack-quantized"] is None
    token, tensor = (g["input_activations"] for g in config["config_groups"].values() if g["format"] == "int-quantized")
    if token["strategy"] == "tensor":
        token, tensor = tensor, token
    same = {"num_bits": 8, "type": "int", "dynamic": True}
    assert token == {**same, "symmetric": True, "strategy": "token"}
    assert tensor == {**same, "symmetric": False, "strategy": "tensor"}
    tree = store_of(model).entries["model.layers.1.mlp.up_proj.weight"].encoded
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], tree.parts["codes"])  # type: ignore[arg-type]


def test_pruned_codes_and_ties(tmp_path: Path) -> None:
    steps: list[Any] = [{"prune.weights": {"ratio": 0.5, "on": "*.q_proj"}}]
    steps.append({"quantize.affine": {"bits": 4, "symmetric": False, "per": "group", "group": 32, "on": "*.q_proj"}})
    model = stored(decoder(), *steps)
    found, _, _ = written(tmp_path, model)
    codes, zero = unpacked(found[f"{Q}.weight_packed"], 4, 64), unpacked(found[f"{Q}.weight_zero_point"].T, 4, 64).T
    gone = model.state_dict()[f"{Q}.weight"] == 0
    assert int(gone.sum()) >= 64 * 32 and torch.equal(codes[gone], zero.repeat_interleave(32, 1)[gone])


def test_rows_are_filled_up_and_settings_are_checked(tmp_path: Path) -> None:
    assert packed(torch.tensor([[-8, 7, 0]]), 4).tolist() == [[0x8F0]]
    assert packed(torch.tensor([[0, 0, 0, -128, 1]]), 8).tolist() == [[0x00808080, 0x81]]
    assert packed(torch.tensor([[0, 0, 0, 127]]), 8).tolist() == [[0xFF808080 - (1 << 32)]]
    with pytest.raises(RecipeError, match="dtype"):
        export(decoder(), "compressed-tensors", tmp_path / "out", source="x", dtype="float64")
