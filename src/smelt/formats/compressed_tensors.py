"""A folder in the layout of Hugging Face whose linear layers are whole numbers, as compressed-tensors has them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.core.store import Activation, store_of
from smelt.core.target import Target
from smelt.formats._affine import Grid, grid_of
from smelt.formats._hf import DTYPES, Leaf, checkpointed, plain, tree_of, with_dtype, write_folder
from smelt.methods.quantize.affine import Affine

PACKED, WHOLE, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


@dataclass(frozen=True)
class CompressedTensors(Export):
    """Codes of linear layers packed into 32-bit words, with their scales and zero points; for transformers and vLLM.

    pack-quantized   a layer stored on an even grid of up to 8 bits with whole zero points: 4 bits a code where they
                     fit, else 8; codes are those of the stored model, 0 in the middle of an asymmetric range
    int-quantized    one with an affine codec at its input, too: 8 bits a code, and how the input is rounded

    Groups that do not divide a row are split until they do.  All else is dense, and listed under `ignore`.  Layers that
    were taken out close ranks.

    source: docs of compressed-tensors 0.20 (compressors pack_quantized and naive_quantized, QuantizationConfig)
    """

    suffix = ""

    source: str | None = setting(
        None, "folder with config.json and the tokenizer's files; nothing: a model of transformers, which has a config"
    )
    dtype: str = setting(
        "stored",
        "of floating tensors and scales: as each is stored, or another",
        choices=("stored", "float32", "float16", "bfloat16"),
    )
    shard: int = setting(5_000_000_000, "bytes of a file at most; more are split, with an index", low=1)

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        made = checkpointed(model, self.source, self.name)
        inputs = {one.path: one for one in store_of(model).activations if one.at == "input"}
        leaves: dict[str, Leaf] = {}
        schemes: dict[str, dict[str, Any]] = {}
        linear, reasons, written = [], Counter[str](), 0
        for name, target in made.tensors.items():
            layer, _, kind = name.rpartition(".")
            if isinstance(target.module, nn.Linear) and kind == "weight":
                linear.append(layer)
            found = self._layer(target, tree_of(model, target), inputs.get(target.places[0][0]))
            if isinstance(found, str):
                leaves[name] = plain(model, target, self.dtype)
                reasons.update([found] if found else [])
                continue
            parts, schemes[layer] = found
            written += schemes[layer]["input_activations"] is not None
            leaves |= {f"{layer}.{key}": Leaf.of(part) for key, part in parts.items()}
        config = with_dtype(made.config, self.dtype)
        if schemes:
            config = {**config, "quantization_config": _quantization(schemes, linear)}
        write_folder(path, leaves, config, made.companions, self.shard)
        notes = [*made.notes, *(f"{count} stored tensors are written dense: {why}" for why, count in reasons.items())]
        if left := len(store_of(model).activations) - written:
            notes.append(f"{left} codecs at inputs and outputs are left out; only affine ones at inputs of layers fit")
        return notes

    def _layer(
        self, target: Target, tree: Any, activation: Activation | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
        """(tensors, scheme) of a weight that can be packed, else why not; '' for one that is not stored."""
        if tree is None:
            return ""
        if not isinstance(target.module, nn.Linear) or target.places[0][1] != "weight":
            return "they are no weights of linear layers"
        if len(target.places) > 1:
            return "they stand in several places"
        if (grid := grid_of(tree)) is None:
            return f"they are stored as {tree}, on no even grid"
        rounded = None if activation is None else _input(activation)
        bits = _bits(grid)
        if bits is None:
            return "their zero points are no codes of 4 or 8 bits (zero: whole makes them so)"
        half = 0 if grid.symmetric else 1 << bits - 1
        codes, zero = (part.to(torch.int32) - half for part in (grid.codes, grid.zero))
        parts = {"weight_scale": self._scale(grid, target.tensor.dtype)}
        if rounded is None:
            parts["weight_packed"] = packed(codes, bits)
            parts["weight_shape"] = torch.tensor(codes.shape)
            if not grid.symmetric:
                parts["weight_zero_point"] = packed(zero.T, bits).T
        else:
            parts["weight"] = codes.to(torch.int8)
            if not grid.symmetric:
                parts["weight_zero_point"] = zero.to(torch.int8)
            parts |= rounded[0]
        groups = grid.scale.shape[1] > 1
        weights = {
            **{"num_bits": bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False},
            **{"strategy": "group" if groups else "channel", "group_size": grid.run if groups else None},
        }
        scheme = {
            "weights": weights,
            "input_activations": None if rounded is None else rounded[1],
            "output_activations": None,
            "format": PACKED if rounded is None else WHOLE,
        }
        return parts, scheme

    def _scale(self, grid: Grid, own: torch.dtype) -> Tensor:
        return grid.scale.to(own if self.dtype == "stored" else DTYPES[self.dtype])


def packed(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [m, k] of 4 or 8 bits as int32 [m, ceil(k bits / 32)]: code + 2^(bits - 1), the first lowest."""
    each = 32 // bits
    words = torch.nn.functional.pad(codes.long() + (1 << bits - 1), (0, -codes.shape[1] % each))
    words = words.unflatten(1, (-1, each)) << torch.arange(0, 32, bits)
    found: Tensor = words.sum(2).to(torch.uint32).view(torch.int32)
    return found


def _bits(grid: Grid) -> int | None:
    """4 or 8, as codes and zero points need; None where they do not fit."""
    if not grid.whole:
        return None
    (low, high), (first, last) = ((int(n) for n in part.aminmax()) for part in (grid.codes, grid.zero))
    for bits in (4, 8):
        half = 1 << bits - 1
        if grid.symmetric and -half <= low and high < half:
            return bits
        if not grid.symmetric and min(low, first) >= 0 and max(high, last) < 2 * half:
            return bits
    return None


def _input(activation: Activation) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, scheme) of how a layer's input is rounded; None where the layout cannot say it."""
    codec, state = activation.codec, activation.state
    if not isinstance(codec, Affine) or codec.bits > 8 or codec.per == "channel" or codec.zero in ("float", "learned"):
        return None
    scale: Any = getattr(state, "scale", None)
    symmetric = bool(codec.symmetric)
    scheme = {
        **{"num_bits": codec.bits, "type": "int", "symmetric": symmetric, "dynamic": scale is None},
        **{"strategy": "token" if codec.per == "token" else "tensor"},
    }
    if scale is None:
        return {}, scheme
    parts = {"input_scale": scale.detach().reshape(1)}
    if not symmetric:
        zero: Any = state.zero
        parts["input_zero_point"] = (zero.reshape(1).to(torch.int32) - (1 << codec.bits - 1)).to(torch.int8)
    return parts, scheme


def _quantization(schemes: dict[str, dict[str, Any]], linear: list[str]) -> dict[str, Any]:
    """What config.json says of the packed layers: those of one scheme are one group."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for layer, scheme in schemes.items():
        same = next((layers for known, layers in groups if known == scheme), None)
        if same is None:
            groups.append((scheme, [layer]))
        else:
            same.append(layer)
    kinds = sorted({scheme["format"] for scheme, _ in groups})
    named = {
        f"group_{i}": {**scheme, "targets": layers if len(groups) > 1 else ["Linear"]}
        for i, (scheme, layers) in enumerate(groups)
    }
    if len(kinds) == 1:
        for group in named.values():
            del group["format"]
    return {
        "quant_method": "compressed-tensors",
        "format": kinds[0] if len(kinds) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": named,
        "ignore": [layer for layer in linear if layer not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
