"""Folders of Hugging Face: names, shards, what config.json says after layers and widths were cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smelt.core.edit import Keep, Replace
from smelt.core.errors import FileError, ModelError, RecipeError
from smelt.core.export import export
from smelt.core.store import apply_edits
from tests.formats._decoder import CONFIG, decoder, source, stored


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def test_shards_and_index(tmp_path: Path) -> None:
    model = decoder()
    given = source(tmp_path / "in", model)
    made = export(model, "huggingface", tmp_path / "out", source=given, shard=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    for name, tensor in state.items():
        assert torch.equal(load_file(tmp_path / "out" / index["weight_map"][name])[name], tensor)
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 40_000
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names and "train.npy" not in names
    assert config(tmp_path / "out") == CONFIG
    assert made.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) and not made.notes


def test_dtypes(tmp_path: Path) -> None:
    model = decoder()
    given = source(tmp_path / "in", model)
    stored(model, {"quantize.float": {"format": "bf16", "on": "*.mlp.*"}})
    export(model, "huggingface", tmp_path / "a", source=given)
    found = tensors(tmp_path / "a")
    kinds = {name.split(".")[-2]: t.dtype for name, t in found.items()}
    assert kinds["up_proj"] == torch.bfloat16 and kinds["q_proj"] == torch.float32
    assert all(torch.equal(found[name].float(), t) for name, t in model.state_dict().items())
    export(model, "huggingface", tmp_path / "b", source=given, dtype="float16")
    assert {t.dtype for t in tensors(tmp_path / "b").values()} == {torch.float16}
    assert config(tmp_path / "b") == {**CONFIG, "torch_dtype": "float16"}


def test_ties(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    model = decoder(tied)
    given = source(tmp_path / "in", model, tied)
    export(model, "huggingface", tmp_path / "out", source=given)
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    model["lm_head"].weight = nn.Parameter(model["lm_head"].weight.detach().clone())  # type: ignore[index]
    export(model, "huggingface", tmp_path / "untied", source=given)
    assert "lm_head.weight" in tensors(tmp_path / "untied") and not config(tmp_path / "untied")["tie_word_embeddings"]


def test_layers_and_widths_that_were_cut(tmp_path: Path) -> None:
    model = decoder()
    lists = {**CONFIG, "layer_types": ["a", "b", "c"]}
    given = source(tmp_path / "in", model, lists)
    last = model.state_dict()["model.layers.2.mlp.up_proj.weight"][:50].clone()
    index = tuple(range(50))
    edits: list[Any] = [Replace("model.layers.1", "skip", {})]
    for i in (0, 2):
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            edits.append(Keep(f"model.layers.{i}.mlp.{name}.weight", dim, index))
    apply_edits(model, edits, "cut")
    made = export(model, "huggingface", tmp_path / "out", source=given)
    assert torch.equal(tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], last)
    said = config(tmp_path / "out")
    assert (said["num_hidden_layers"], said["intermediate_size"], said["layer_types"]) == (2, 50, ["a", "c"])
    assert len(made.notes) == 2 and "1 of 3 layers" in made.notes[0] and "intermediate_size is 50" in made.notes[1]
    apply_edits(model, [Keep("model.layers.0.mlp.up_proj.weight", 0, index[:9])], "cut")
    with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj.weight is \[9, 64\], and \[96, 64\]"):
        export(model, "huggingface", tmp_path / "no", source=given)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = decoder()
    given = source(tmp_path / "in", model)
    with pytest.raises(RecipeError, match="huggingface needs the setting 'source'"):
        export(model, "huggingface", tmp_path / "out")
    with pytest.raises(FileError, match=r"has no config\.json"):
        export(model, "huggingface", tmp_path / "out", source=str(tmp_path))
    chain = {"layers": [["Linear", {"in_features": 64, "out_features": 4}], ["Linear", {"in_features": 4}]]}
    chain["layers"][1][1]["out_features"] = 64  # type: ignore[index]
    apply_edits(model, [Replace("model.layers.0.self_attn.q_proj", "chain", chain)], "lowrank")
    with pytest.raises(ModelError, match=r"has 4 tensor.*q_proj.0.weight.*lacks 1 .*q_proj.weight"):
        export(model, "huggingface", tmp_path / "out", source=given)
    assert not (tmp_path / "out").exists()
