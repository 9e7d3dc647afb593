"""A folder in the layout of Hugging Face: `.safetensors` files, config.json, the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from smelt.core.export import Export, Given
from smelt.core.settings import setting
from smelt.core.store import store_of
from smelt.formats._hf import checkpointed, plain, with_dtype, write_folder
from smelt.forms.float import Float


@dataclass(frozen=True)
class HuggingFace(Export):
    """Dense tensors under the names that the model has, for transformers and whatever else reads such folders.

    Values are those of the stored model; what is stored in fewer than 16 bits is written out, so the folder is as large
    as a dense one (compressed-tensors packs linear layers).  Layers that were taken out close ranks.
    """

    suffix = ""

    source: str | None = setting(
        None, "folder with config.json and the tokenizer's files; nothing: a model of transformers, which has a config"
    )
    dtype: str = setting(
        "stored",
        "of floating tensors: as each is stored, if that is 16 bits or more, or another",
        choices=("stored", "float32", "float16", "bfloat16"),
    )
    shard: int = setting(5_000_000_000, "bytes of a file at most; more are split, with an index", low=1)

    def write(self, model: nn.Module, path: Path, given: Given) -> list[str]:
        made = checkpointed(model, self.source, self.name)
        leaves = {name: plain(model, target, self.dtype) for name, target in made.tensors.items()}
        write_folder(path, leaves, with_dtype(made.config, self.dtype), made.companions, self.shard)
        held = store_of(model)
        wide = [name for name, entry in held.entries.items() if not isinstance(entry.encoded.form, Float)]
        notes = list(made.notes)
        if wide:
            notes.append(f"{len(wide)} stored tensors are written as their decoded values, not in fewer bits")
        if held.activations:
            notes.append(f"{len(held.activations)} codecs at inputs and outputs are left out; only tensors are written")
        return notes
