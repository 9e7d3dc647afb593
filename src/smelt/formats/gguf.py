"""A `.gguf` file of a Llama model, for llama.cpp and what is built on it."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.errors import ModelError
from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.core.target import Target
from smelt.formats import _ggml, _vocabulary
from smelt.formats._affine import Grid, grid_of
from smelt.formats._ggml import BLOCK, TYPES, Entry
from smelt.formats._hf import Checkpointed, checkpointed, plain, tree_of

MODELS = ("llama", "mistral")
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
INNER = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{a}_proj": f"attn_{b}" for a, b in {"q": "q", "k": "k", "v": "v", "o": "output"}.items()},
    **{f"mlp.{a}_proj": f"ffn_{a}" for a in ("gate", "up", "down")},
}
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Gguf(Export):
    """A model of the Llama family in one file: tensors in ggml's blocks, and what config and tokenizer say.

    A matrix stored on an even grid, whose scales hold for 32 neighbours of a row or a multiple, keeps its codes:

    Q4_0   4 bits or fewer, mirrored at 0 (or with whole zero points near the middle)
    Q4_1   4 bits or fewer, with any zero points
    Q8_0   8 bits or fewer, mirrored at 0 (or with whole zero points near the middle)

    A block has its scale, and its least value, in half precision; what is not a half is rounded to one, and the notes
    give the largest change.  Other matrices are written as `dtype` says, norms and biases as F32.  The rows of the
    query and key weights are put in the order of ggml's rotary embedding, in which neighbours turn together.

    source: the GGUF specification, version 3; layouts of ggml's block_q4_0, block_q4_1 and block_q8_0
    """

    suffix = ".gguf"

    source: str | None = setting(
        None, "folder with config.json and the tokenizer's files; nothing: a model of transformers, which has a config"
    )
    dtype: str = setting(
        "stored",
        "of matrices without blocks: as each is stored (F32, or 16 bits), or another",
        choices=("stored", "float32", "float16", "bfloat16"),
    )

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        made = checkpointed(model, self.source, self.name)
        keys = _keys(made)
        tensors: dict[str, Entry] = {}
        counts, reasons, changes = Counter[str](), Counter[tuple[str, str]](), dict[str, float]()
        for name, target in made.unique.items():
            own = _name(name)
            heads = _heads(name, made.config)
            tree = tree_of(model, target)
            grid = grid_of(tree)
            kind, why = ("", f"they are stored as {tree}, on no even grid") if grid is None else _ggml.fitting(grid)
            if grid is None or not kind:
                tensors[own] = self._dense(model, target, heads)
                reasons.update([(tensors[own].kind, why)] if tree is not None else [])
            else:
                grid = _permuted(grid.split(BLOCK), heads)
                tensors[own] = _ggml.blocks(grid, kind)
                changes[kind] = max(changes.get(kind, 0.0), _ggml.change(grid, kind))
            if target.tensor.dim() > 1:
                counts[tensors[own].kind] += target.tensor.numel()
        keys["general.file_type"] = ("u32", TYPES[counts.most_common(1)[0][0]][2])
        keys |= _vocabulary.keys(Path(self.source or "."), made.config, made.notes)
        _ggml.write(path, keys, tensors)
        notes = [*made.notes]
        notes += [f"{n} stored tensors are written as {kind}: {why}" for (kind, why), n in reasons.items()]
        for kind, change in changes.items():
            if change:
                notes.append(f"{kind}: scales rounded to half precision move values by {change:.2g} steps at most")
        return notes

    def _dense(self, model: nn.Module, target: Target, heads: int) -> Entry:
        tensor = plain(model, target, self.dtype).make()
        kind = DTYPES.get(tensor.dtype, "F32") if tensor.dim() > 1 else "F32"
        return _ggml.dense(_turned(tensor, heads), kind)


def _name(name: str) -> str:
    """What GGUF calls a tensor.  Raises ModelError for one that a Llama does not have."""
    module, _, last = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{last}"
    match = LAYER.match(module)
    if match is None or match[2] not in INNER:
        raise ModelError(f"gguf: {name} is no tensor of a Llama; only models of that family are written")
    return f"blk.{match[1]}.{INNER[match[2]]}.{last}"


def _heads(name: str, config: dict[str, Any]) -> int:
    """Heads of a tensor whose rows change places, else 0."""
    heads = int(config["num_attention_heads"])
    if ".self_attn.q_proj." in name:
        return heads
    return int(config.get("num_key_value_heads") or heads) if ".self_attn.k_proj." in name else 0


def _turned(x: Tensor, heads: int) -> Tensor:
    """Rows of each head so that the i-th of its first half and the i-th of its second are neighbours."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else x


def _permuted(grid: Grid, heads: int) -> Grid:
    codes, scale, zero = (_turned(part, heads) for part in (grid.codes, grid.scale, grid.zero))
    return replace(grid, codes=codes, scale=scale, zero=zero)


def _keys(made: Checkpointed) -> dict[str, tuple[str, Any]]:
    """general.* and llama.* of a config.  Raises ModelError: of another family, or with a rotary embedding that GGUF
    cannot say."""
    config = made.config
    if config.get("model_type") not in MODELS:
        raise ModelError(f"gguf: model_type is {config.get('model_type')!r}; there is {', '.join(MODELS)}")
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    size = int(config.get("head_dim") or width // heads)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ModelError(f"gguf: the rotary embedding is of type {kind!r}; there is default, linear")
    base = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    counts = {
        **{"context_length": config["max_position_embeddings"], "embedding_length": width},
        **{"block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"]},
        **{"attention.head_count": heads, "attention.head_count_kv": config.get("num_key_value_heads") or heads},
        **{"rope.dimension_count": size, "attention.key_length": size, "attention.value_length": size},
        "vocab_size": config["vocab_size"],
    }
    numbers = {"rope.freq_base": base, "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"])}
    keys: dict[str, tuple[str, Any]] = {
        "general.architecture": ("text", "llama"),
        "general.type": ("text", "model"),
        "general.name": ("text", str(config.get("_name_or_path") or "model")),
        "general.quantization_version": ("u32", 2),
        **{f"llama.{key}": ("u32", int(value)) for key, value in counts.items()},
        **{f"llama.{key}": ("f32", value) for key, value in numbers.items()},
    }
    if kind == "linear":
        keys["llama.rope.scaling.type"] = ("text", "linear")
        keys["llama.rope.scaling.factor"] = ("f32", float(rope["factor"]))
    if not math.isfinite(base) or any(int(value) < 1 for value in counts.values()):
        raise ModelError(f"gguf: the config holds no sane sizes: {counts}")
    return keys
