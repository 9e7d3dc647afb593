"""GGUF files, read here by the specification."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smelt.core.errors import FileError, ModelError
from smelt.core.export import export
from tests.formats._decoder import CONFIG, decoder, source, stored

NUMBERS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34)}  # values and bytes of one


class Reader:
    def __init__(self, path: Path):
        self.data, self.at = path.read_bytes(), 0
        assert self.data[:4] == b"GGUF"
        self.at = 4
        version, tensors, keys = self.number("<I"), self.number("<Q"), self.number("<Q")
        assert version == 3
        self.keys = {self.text(): self.value(self.number("<I")) for _ in range(keys)}
        heads = [(self.text(), self.shape(), self.number("<I"), self.number("<Q")) for _ in range(tensors)]
        start = -(-self.at // 32) * 32
        assert len(self.data) % 32 == 0
        self.tensors = {name: self.tensor(shape, kind, start + at) for name, shape, kind, at in heads}
        self.kinds = {name: kind for name, _, kind, _ in heads}

    def number(self, form: str) -> Any:
        (found,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        size = self.number("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def shape(self) -> list[int]:
        return [self.number("<Q") for _ in range(self.number("<I"))][::-1]

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            of = self.number("<I")
            return [self.value(of) for _ in range(self.number("<Q"))]
        return self.number(NUMBERS[kind])

    def tensor(self, shape: list[int], kind: int, at: int) -> Tensor:
        assert at % 32 == 0
        per, size = BLOCKS[kind]
        count = int(np.prod(shape)) // per
        raw = np.frombuffer(self.data, np.uint8, count * size, at)
        if kind in (0, 1, 30):
            dtype = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[kind]
            return torch.from_numpy(raw.copy()).view(dtype).float().reshape(shape)
        values = []
        for block in raw.reshape(count, size):
            d = float(block[:2].view(np.float16)[0])
            if kind == 8:
                values += [d * q for q in block[2:].view(np.int8).tolist()]
                continue
            m, body = (float(block[2:4].view(np.float16)[0]), block[4:]) if kind == 3 else (-8 * d, block[2:])
            values += [d * (q & 15) + m for q in body.tolist()] + [d * (q >> 4) + m for q in body.tolist()]
        return torch.tensor(values).reshape(shape)


def turned(x: Tensor, position: int, neighbours: bool) -> Tensor:
    """The rotary embedding of heads [n, size]: of the two halves, or of neighbours."""
    size = x.shape[1]
    angles = position * 10000.0 ** (-torch.arange(0, size, 2) / size)
    a, b = (x[:, ::2], x[:, 1::2]) if neighbours else x.chunk(2, 1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 1)


def test_tensors_and_keys(tmp_path: Path) -> None:
    model = decoder()
    made = export(model, "gguf", tmp_path / "a.gguf", source=source(tmp_path / "in", model, x="1"))
    read = Reader(tmp_path / "a.gguf")
    state = model.state_dict()
    assert len(read.tensors) == len(state) and set(read.kinds.values()) == {0}
    assert torch.equal(read.tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(read.tensors["output.weight"], state["lm_head.weight"])
    assert torch.equal(read.tensors["output_norm.weight"], state["model.norm.weight"])
    assert torch.equal(read.tensors["blk.2.ffn_norm.weight"], state["model.layers.2.post_attention_layernorm.weight"])
    assert torch.equal(read.tensors["blk.1.attn_output.weight"], state["model.layers.1.self_attn.o_proj.weight"])
    wanted = {"block_count": 3, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4}
    wanted |= {"attention.head_count_kv": 2, "rope.dimension_count": 16, "context_length": 128, "vocab_size": 40}
    assert {key: read.keys[f"llama.{key}"] for key in wanted} == wanted
    assert read.keys["general.architecture"] == "llama" and read.keys["general.file_type"] == 0
    assert read.keys["llama.rope.freq_base"] == 10000 and read.keys["tokenizer.ggml.model"] == "none"
    assert abs(read.keys["llama.attention.layer_norm_rms_epsilon"] - 1e-5) < 1e-12
    assert len(made.notes) == 1 and "token numbers only" in made.notes[0]
    # queries and keys turn in pairs of neighbours here, and their products stay the same
    x = torch.randn(64)
    scores = []
    for q, k, near in (
        (state["model.layers.0.self_attn.q_proj.weight"], state["model.layers.0.self_attn.k_proj.weight"], False),
        (read.tensors["blk.0.attn_q.weight"], read.tensors["blk.0.attn_k.weight"], True),
    ):
        heads = [turned((w @ x).view(-1, 16), at, near) for w, at in ((q, 7), (k, 3))]
        scores.append((heads[0].view(2, 2, 16) * heads[1].view(2, 1, 16)).sum(2))
    assert torch.allclose(*scores, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "exact"),
    [
        (2, {"bits": 4, "per": "group", "group": 32, "scales": "float16"}, True),
        (2, {"bits": 3, "per": "group", "group": 64, "scales": "float16"}, True),
        (3, {"bits": 4, "per": "group", "group": 32, "scales": "float16", "symmetric": False}, False),
        (8, {"bits": 8, "per": "group", "group": 32, "scales": "float16"}, True),
        (8, {"bits": 6, "per": "group", "group": 32, "scales": "float16", "symmetric": False, "zero": "whole"}, True),
        (8, {"bits": 8}, False),
        (0, {"bits": 4, "per": "group", "group": 16}, True),
        (0, {"bits": 8, "symmetric": False}, True),
    ],
)
def test_grids_become_blocks(tmp_path: Path, kind: int, settings: dict[str, Any], exact: bool) -> None:
    model = decoder()
    given = source(tmp_path / "in", model, x="1")
    stored(model, {"quantize.affine": {**settings, "on": "model.*"}})
    made = export(model, "gguf", tmp_path / "a.gguf", source=given)
    read = Reader(tmp_path / "a.gguf")
    name, other = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    assert read.kinds["blk.0.ffn_down.weight"] == kind and read.kinds["output.weight"] == 0
    assert read.kinds["token_embd.weight"] == kind and read.kinds["blk.0.attn_norm.weight"] == 0
    assert read.keys["general.file_type"] == {2: 2, 3: 3, 8: 7, 0: 0}[kind]
    state = model.state_dict()
    found, want = read.tensors["blk.0.ffn_down.weight"], state[name]
    rows = state[other].view(2, 2, 8, 64).transpose(1, 2).reshape(32, 64)  # halves of a head become neighbours
    if exact:
        assert torch.equal(found, want) and torch.equal(read.tensors["blk.1.attn_k.weight"], rows)
    else:
        assert torch.allclose(found, want, atol=float(want.abs().max()) * 2**-10)
        assert torch.allclose(read.tensors["blk.1.attn_k.weight"], rows, atol=float(rows.abs().max()) * 2**-10)
    assert any("half precision" in note for note in made.notes) is (not exact)
    assert any("written as F32" in note for note in made.notes) is (kind == 0)


def test_tokenizers(tmp_path: Path) -> None:
    model = decoder()
    special = [{"id": i, "content": token, "special": True} for i, token in enumerate(["<unk>", "<s>", "</s>"])]
    bytes_ = {f"<0x{i:02X}>": 3 + i for i in range(20)}
    pieces = {"a": 23, "b": 24, "ab": 25, "abb": 26}
    vocabulary = {token["content"]: token["id"] for token in special} | bytes_ | pieces
    merges = [["a", "b"], ["ab", "b"]]
    bpe = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocabulary, "merges": merges}
    text = {"added_tokens": special, "model": bpe, "normalizer": {"type": "Prepend", "prepend": "_"}}
    own = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True}
    files = {"tokenizer.json": json.dumps(text), "tokenizer_config.json": json.dumps(own)}
    export(model, "gguf", tmp_path / "a.gguf", source=source(tmp_path / "in", model, **files))
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in Reader(tmp_path / "a.gguf").keys.items()}
    assert keys["model"] == "llama" and keys["tokens"][25:28] == ["ab", "abb", "[PAD27]"] and len(keys["tokens"]) == 40
    assert keys["token_type"] == [2, 3, 3] + 20 * [6] + 4 * [1] + 13 * [5]
    assert keys["scores"][25] > keys["scores"][26] > keys["scores"][23] == keys["scores"][24]
    assert (keys["bos_token_id"], keys["eos_token_id"], keys["unknown_token_id"]) == (1, 2, 0)
    assert keys["add_bos_token"] is True and keys["add_space_prefix"] is True
    bpe.update(byte_fallback=False)
    text |= {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}, "normalizer": None}
    files["tokenizer.json"] = json.dumps(text)
    made = export(model, "gguf", tmp_path / "b.gguf", source=source(tmp_path / "in2", model, **files))
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in Reader(tmp_path / "b.gguf").keys.items()}
    assert (keys["model"], keys["pre"], keys["merges"]) == ("gpt2", "gpt-2", ["a b", "ab b"]) and not made.notes


def test_what_cannot_be_written(tmp_path: Path) -> None:
    model = decoder()
    other = source(tmp_path / "a", model, {**CONFIG, "model_type": "gpt2"}, x="1")
    with pytest.raises(ModelError, match="model_type is 'gpt2'; there is llama"):
        export(model, "gguf", tmp_path / "a.gguf", source=other)
    rope = {**CONFIG, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(ModelError, match="rotary embedding is of type 'yarn'"):
        export(model, "gguf", tmp_path / "a.gguf", source=source(tmp_path / "b", model, rope, x="1"))
    pieces = json.dumps({"model": {"type": "Unigram"}})
    with pytest.raises(FileError, match="'Unigram'"):
        export(model, "gguf", tmp_path / "a.gguf", source=source(tmp_path / "c", model, **{"tokenizer.json": pieces}))
    assert not (tmp_path / "a.gguf").exists()
