"""A decoder with the tensor names of a Llama of transformers, and a folder such as its users have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smelt.core.apply import apply_step
from smelt.core.method import Known
from smelt.core.recipe import Recipe

CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64},
    **{"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 40, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    **{"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"},
    **{"attention_bias": False, "mlp_bias": False},
}


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)


def decoder(config: dict[str, Any] = CONFIG) -> nn.Module:
    """The tensors of a Llama; it does not run."""
    torch.manual_seed(0)
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // 4
    shared = size * config["num_key_value_heads"]

    def linear(a: int, b: int) -> nn.Linear:
        return nn.Linear(a, b, bias=False)

    def layer() -> nn.Module:
        q, k, v, o = linear(width, width), linear(width, shared), linear(width, shared), linear(width, width)
        attention = nn.ModuleDict({"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o})
        gate, up, down = linear(width, inner), linear(width, inner), linear(inner, width)
        mlp = nn.ModuleDict({"gate_proj": gate, "up_proj": up, "down_proj": down})
        norms = {"input_layernorm": Norm(width), "post_attention_layernorm": Norm(width)}
        return nn.ModuleDict({"self_attn": attention, "mlp": mlp, **norms})

    layers = nn.ModuleList(layer() for _ in range(config["num_hidden_layers"]))
    embed = nn.Embedding(config["vocab_size"], width)
    body = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": Norm(width)})
    model = nn.ModuleDict({"model": body, "lm_head": linear(width, config["vocab_size"])})
    if config["tie_word_embeddings"]:
        model["lm_head"].weight = embed.weight  # type: ignore[assignment]
    return model


def source(folder: Path, model: nn.Module, config: dict[str, Any] = CONFIG, **more: str) -> str:
    """A folder with a config, the tensors and a tokenizer of pieces, or with other files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "train.npy").write_bytes(b"large")
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor.detach()))
    save_file(dict(unique.values()), folder / "model.safetensors")
    for name, text in (more or {"tokenizer.json": "{}", "tokenizer_config.json": "{}"}).items():
        (folder / name).write_text(text)
    return str(folder)


def stored(model: nn.Module, *steps: Any, seed: int = 0) -> nn.Module:
    for i, step in enumerate(Recipe.of(list(steps)).steps, 1):
        apply_step(model, step, f"{i}: {step.key}", Known(seed=seed), ())
    return model
