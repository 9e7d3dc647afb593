"""Folders in the layout of Hugging Face: config.json, tensors by name in `.safetensors`, the tokenizer's files."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smelt.core.encoded import Encoded
from smelt.core.errors import FileError, ModelError, RecipeError
from smelt.core.store import store_of
from smelt.core.target import Target, targets
from smelt.formats.safetensors import Checkpoint
from smelt.forms.float import Float

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# What goes with a model besides its config and its tensors: tokenizer, generation settings, code.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Leaf:
    """A tensor that is made when it is written."""

    make: Callable[[], Tensor]
    nbytes: int

    @staticmethod
    def of(tensor: Tensor) -> Leaf:
        return Leaf(lambda: tensor, tensor.nbytes)


@dataclass
class Checkpointed:
    """A model as a folder has it.

    config: config.json.
    tensors: what a tensor is called there -> the target; a tied one may have several names.
    companions: files that are copied.
    notes: for the user.
    """

    config: dict[str, Any]
    tensors: dict[str, Target]
    companions: list[Path]
    notes: list[str]

    @property
    def unique(self) -> dict[str, Target]:
        """Each target once, under its first name."""
        found: dict[int, str] = {}
        for name, target in self.tensors.items():
            found.setdefault(id(target.tensor), name)
        return {name: self.tensors[name] for name in found.values()}


def checkpointed(model: nn.Module, source: str | None, name: str) -> Checkpointed:
    """The model with names and a config that transformers reads.

    Where the source has weights, names and shapes are compared with theirs: layers that were taken out close ranks,
    and an inner width that was cut is said in the config.

    Args:
        source: folder with config.json, or nothing for a model of transformers, which knows its config.
        name: of the format, for errors.

    Raises:
        RecipeError: no source where one is needed.
        FileError: no config there, or one that is no JSON object.
        ModelError: tensors that such a checkpoint does not have, or lacks, or of shapes that no config can say.
    """
    found = {n: t for t in targets(model) for n in (_name(place) for place in t.places)}
    if source is None:
        own: Any = getattr(model, "config", None)
        if not hasattr(own, "to_json_string"):
            raise RecipeError(f"{name} needs the setting 'source': the folder with the model's {CONFIG}")
        config = {**json.loads(own.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
        return Checkpointed(config, _tied(found, config, None), [], [])
    folder = Path(source)
    config = _read_config(folder)
    companions = sorted({p for pattern in COMPANIONS for p in folder.glob(pattern) if _companion(p)})
    made = Checkpointed(config, found, companions, [])
    shapes = _shapes(folder)
    if not shapes:
        made.notes.append(f"{source} holds no .safetensors to compare names and shapes with")
    made.tensors = _tied(_renumbered(made, shapes), config, set(shapes) or None)
    if shapes:
        _compare(made, shapes)
    return made


def write_folder(
    path: Path, leaves: Mapping[str, Leaf], config: Mapping[str, Any], companions: Sequence[Path], limit: int
) -> None:
    """The folder `path`: files of at most `limit` bytes of tensors (or of one tensor), with an index if several."""
    path.mkdir()
    shards: list[dict[str, Leaf]] = [{}]
    size = 0
    for name, leaf in leaves.items():
        if shards[-1] and size + leaf.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = leaf
        size += leaf.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        total = {"total_size": sum(leaf.nbytes for leaf in leaves.values())}
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(path / INDEX, {"metadata": total, "weight_map": dict(sorted(places.items()))})
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: leaf.make().detach().cpu().clone().contiguous() for name, leaf in shard.items()}
        save_file(tensors, path / file, {"format": "pt"})
    _write_json(path / CONFIG, config)
    for companion in companions:
        shutil.copyfile(companion, path / companion.name)


def plain(model: nn.Module, target: Target, dtype: str) -> Leaf:
    """A tensor as it is: in the dtype it is stored in if that is a float of 16 bits (`stored`), or in another."""
    tensor = target.tensor.detach()
    if not tensor.is_floating_point():
        return Leaf.of(tensor)
    entry = store_of(model).entries.get(target.name)
    if dtype == "stored":
        held = entry.encoded.parts.get("values") if entry and isinstance(entry.encoded.form, Float) else None
        return Leaf.of(held if isinstance(held, Tensor) and held.dtype in HALVES else tensor)
    kind = DTYPES[dtype]
    return Leaf(lambda: tensor.to(kind), tensor.numel() * kind.itemsize)


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config, saying the dtype in which tensors were written; as it was where that is `stored`."""
    if dtype == "stored":
        return config
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}


def tree_of(model: nn.Module, target: Target) -> Encoded | None:
    """What a target is stored as, or None where it is dense."""
    entry = store_of(model).entries.get(target.name)
    return entry.encoded if entry else None


def _name(place: tuple[str, str]) -> str:
    return ".".join(part for part in place if part)


def _companion(path: Path) -> bool:
    return path.is_file() and path.name != CONFIG and not path.name.endswith(".index.json")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"source {str(folder)!r} has no {CONFIG} that can be read: {error.strerror}") from None
    except ValueError as error:
        raise FileError(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise FileError(f"{str(path)!r} is no JSON object")
    return config


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with Checkpoint(path) as file:
            found |= {entry.name: entry.shape for entry in file.header.entries}
    return found


def _tied(found: Mapping[str, Target], config: dict[str, Any], known: set[str] | None) -> dict[str, Target]:
    """One name for tied tensors where the config ties them, and all where it does not; what nobody knows of the
    buffers is left out."""
    ties = bool(config.get("tie_word_embeddings"))
    groups: dict[int, list[str]] = {}
    for name, target in found.items():
        groups.setdefault(id(target.tensor), []).append(name)
    kept: dict[str, Target] = {}
    for names in groups.values():
        target = found[names[0]]
        if known is not None:
            if not target.parameter and not known & set(names):
                continue
            names = [name for name in names if name in known] or names
        kept |= dict.fromkeys(names[:1] if ties else names, target)
    return kept


def _renumbered(made: Checkpointed, shapes: Mapping[str, Any]) -> dict[str, Target]:
    """Names with the numbers of layers that are still there, 0, 1, ...; the config says how many they are."""
    count = made.config.get("num_hidden_layers")
    lists: dict[str, set[int]] = {}
    for name in shapes:
        if match := LAYER.match(name):
            lists.setdefault(match[1], set()).add(int(match[2]))
    left: dict[str, set[int]] = {prefix: set() for prefix, numbers in lists.items() if len(numbers) == count}
    for name in made.tensors:
        if (match := LAYER.match(name)) and match[1] in left:
            left[match[1]].add(int(match[2]))
    gone = {prefix: sorted(lists[prefix] - numbers) for prefix, numbers in left.items()}
    if len(left) != 1 or not any(gone.values()):
        return made.tensors
    ((prefix, numbers),) = left.items()
    order = {old: new for new, old in enumerate(sorted(numbers))}
    for key, value in made.config.items():
        if isinstance(value, list) and len(value) == count:
            made.config[key] = [value[i] for i in order]
    made.config["num_hidden_layers"] = len(order)
    made.notes.append(f"{len(gone[prefix])} of {count} layers were taken out; the others are numbered anew")

    def renamed(name: str) -> str:
        match = LAYER.match(name)
        return f"{prefix}.{order[int(match[2])]}.{match[3]}" if match and match[1] == prefix else name

    return {renamed(name): target for name, target in made.tensors.items()}


def _compare(made: Checkpointed, shapes: Mapping[str, tuple[int, ...]]) -> None:
    count = made.config.get("num_hidden_layers")
    wanted = {}
    for name, shape in shapes.items():
        match = LAYER.match(name)
        if match and isinstance(count, int) and int(match[2]) >= count and name not in made.tensors:
            continue  # a layer that was taken out
        wanted[name] = shape
    own = {name: tuple(target.tensor.shape) for name, target in made.tensors.items()}
    more = [name for name in own if name not in wanted]
    missing = [name for name in wanted if name not in own]
    if made.config.get("tie_word_embeddings"):
        ours = {id(target.tensor) for name, target in made.tensors.items() if name in wanted}
        untied = [name for name in more if id(made.tensors[name].tensor) not in ours and not missing]
        if untied and len(untied) == len(more) == 1:
            made.config["tie_word_embeddings"] = False
            more = []
    if more or missing:
        what = [f"{verb} {_brief(names)}" for verb, names in (("has", more), ("lacks", missing)) if names]
        raise ModelError(
            f"the model {' and '.join(what)}, other than the checkpoint in source; a layer of another kind has no "
            "place in this layout"
        )
    changed = [(n, old, own[n]) for n, old in wanted.items() if own[n] != old]
    cuts = Counter((a, b) for _, old, new in changed for a, b in zip(old, new, strict=False) if a != b)
    width = made.config.get("intermediate_size")
    if not changed:
        return
    if len(cuts) == 1 and next(iter(cuts))[0] == width and all(len(old) == len(new) for _, old, new in changed):
        made.config["intermediate_size"] = next(iter(cuts))[1]
        made.notes.append(f"intermediate_size is {made.config['intermediate_size']}; it was {width}")
        return
    rare = cuts.most_common()[-1:]
    name, old, new = next(c for c in changed if not rare or rare[0][0] in zip(c[1], c[2], strict=False))
    raise ModelError(f"{name} is {list(new)}, and {list(old)} in source; no {CONFIG} of this layout can say so")


def _brief(names: Sequence[str]) -> str:
    return f"{len(names)} tensor(s) ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
