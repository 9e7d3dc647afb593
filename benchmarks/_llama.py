"""A Llama decoder with the tensor names of transformers, read from its files; byte windows to judge it by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

LENGTH = 256
OFFSET = 200_000


class Norm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, shared: int):
        super().__init__()
        self.dim = width // heads
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(width, shared * self.dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(2, (-1, self.dim)).transpose(1, 2) for layer in layers)
        q, k = _turned(q, turn), _turned(k, turn)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding."""
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-second, first], -1) * turn[1]


class Gated(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        heads = config["num_attention_heads"]
        self.self_attn = Attention(width, heads, config.get("num_key_value_heads", heads))
        self.mlp = Gated(width, config["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.dim = config["hidden_size"] // config["num_attention_heads"]
        self.theta = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]

    def forward(self, ids: Tensor) -> Tensor:
        x, turn = self.embed_tokens(ids), self.turn(ids)
        for layer in self.layers:
            x = layer(x, turn)
        return self.norm(x)

    def turn(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rates = self.theta ** (-torch.arange(0, self.dim, 2, device=ids.device) / self.dim)
        angles = (torch.arange(ids.shape[1], device=ids.device)[:, None] * rates).repeat(1, 2)
        return angles.cos(), angles.sin()


class Llama(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def read(folder: Path) -> Llama:
    model = Llama(json.loads((folder / "config.json").read_text()))
    fill(model, folder / "model.safetensors")
    return model.eval()


def fill(model: Llama, path: Path) -> None:
    """Read tensors into a model; a tied output layer need not be there.  Raises ValueError for any other name."""
    tensors = load_file(path)
    missing, more = model.load_state_dict(tensors, strict=False)
    if more or [n for n in missing if model.get_parameter(n) is not model.model.embed_tokens.weight]:
        raise ValueError(f"{path} lacks {missing} and has {more} besides")


def calibration(folder: Path, count: int, seed: int) -> Tensor:
    """int64 [count, 256]: windows of the training text from random places."""
    text = np.load(folder / "train.npy", mmap_mode="r")
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, count)
    return torch.from_numpy(np.stack([text[i : i + LENGTH] for i in starts]).astype(np.int64))


@torch.no_grad()
def perplexity(model: nn.Module, folder: Path, windows: int = 64) -> float:
    """Per byte, over windows of 256 that follow one another in the held-out text, each scored alone."""
    text = np.load(folder / "valid.npy", mmap_mode="r")[OFFSET : OFFSET + windows * LENGTH]
    total = 0.0
    for ids in torch.from_numpy(text.astype(np.int64)).view(windows, LENGTH).split(8):
        logits = model(ids)[:, :-1].flatten(0, 1).double()
        total += float(functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (windows * (LENGTH - 1)))
