"""Tensors without a model in a `.smelt` file: features of a data set, what is computed once and read often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.core.apply import seed_of
from smelt.core.encoded import Encoded
from smelt.core.errors import ModelError, RuleError
from smelt.core.method import Codec, Lossless, Stats
from smelt.core.output import check_output
from smelt.core.recipe import Recipe
from smelt.core.store import pack
from smelt.formats._container import check_holds, write
from smelt.formats._meta import Writer
from smelt.formats.smelt import coders


@torch.no_grad()
def save_file(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    codec: Any = None,
    *,
    tail: Sequence[Lossless] | None = None,
    force: bool = False,
    seed: int = 0,
) -> int:
    """Write tensors by name, complete or not at all; returns the bytes of the file.  `load_file` and `open` read it.

        smelt.save_file({"features": x, "labels": y}, "cache.smelt", {"quantize.affine": {"bits": 8}})
        x = smelt.load_file("cache.smelt")["features"]

    Args:
        codec: what floating tensors are stored by, a method or recipe data; None: nothing is lost.
        tail: lossless codecs for every leaf, of which the smallest result is taken; by default `code.bits` and
            `code.entropy` (rANS and Huffman), () for none.
        force: replace an existing file.
        seed: of codecs that draw at random.

    Raises:
        OutputError: the file exists, no space, not writable.
        RecipeError, RuleError: no such codec, or one that needs to know more than the values.
        ModelError: something that no file can hold.
    """
    path = Path(path)
    lossy: Codec | None = None
    if codec is not None:
        steps = Recipe.of([codec]).steps
        act = steps[0].act
        if len(steps) != 1 or not isinstance(act, Codec) or act.lossless or act.needs_at("weight"):
            raise RuleError(f"save_file takes one codec that needs nothing but values, not {steps[0].key}")
        lossy = act
    check_output(path, force)
    last = coders(()) if tail is None else tuple(tail)
    writer, pieces = Writer(), []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelError(f"save_file takes tensors by name, not {name!r}: {type(tensor).__name__}")
        check_holds(tensor, name)
        x = tensor.detach().cpu().contiguous()
        part: Tensor | Encoded = x
        if lossy is not None and tensor.is_floating_point() and tensor.numel():
            part = lossy.encode(x, lossy.fit(x, Stats(seed=seed_of(seed, name))))
        pieces += [name, writer.part(pack(part, last))]
    return write(path, {"tensors": pieces}, writer.leaves, sealed=writer.sealed, force=force)
