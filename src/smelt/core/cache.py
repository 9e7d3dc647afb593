"""What a cached state of a run depends on: model, data, teacher, job and the recipe up to a step."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.core import data as data_module
from smelt.core.data import identity
from smelt.core.errors import OutputError
from smelt.core.job import Job
from smelt.core.recipe import Recipe
from smelt.core.source import Source
from smelt.core.store import has_store, store_of
from smelt.version import __version__


def keys(source: Source, model: nn.Module, recipe: Recipe, job: Job) -> list[str] | None:
    """One key for the state after each step, the model as it came being step 0; None where that cannot be known."""
    data = job.data
    known = data_module.fingerprint(data.splits()) if data is not None and data.fingerprint is None else ""
    if known is None or not (job.teacher is None or isinstance(job.teacher, nn.Module)):
        return None
    parts: list[Any] = [source.builder, sorted(source.arguments.items()), *_of_module(model)]
    parts += [data.fingerprint or known if data is not None else "", identity(job.loss)]
    parts.append(job.metric if isinstance(job.metric, str) else identity(job.metric))
    parts += _of_module(job.teacher) if isinstance(job.teacher, nn.Module) else []
    parts += [job.seed, job.device, job.latency, job.threads or torch.get_num_threads(), __version__, torch.__version__]
    base = repr(parts)
    return [
        hashlib.sha256(f"{base}{recipe.prefix_hash(index)}".encode()).hexdigest()[:32]
        for index in range(len(recipe) + 1)
    ]


def _of_module(model: nn.Module) -> list[Any]:
    """Structure, code of the forward passes, values, what is frozen, and what is stored of it."""
    parts: list[Any] = [repr(model), Source.of(model).fingerprint()]
    parts += [f"{type(m).__qualname__} {identity(type(m).forward)}" for m in model.modules()]
    parts.append([p.requires_grad for p in model.parameters()])
    if has_store(model):
        held = store_of(model)
        for name, entry in held.entries.items():
            leaves = Source(tensors={path: leaf.detach for path, leaf in entry.encoded.leaves()})
            parts += [name, str(entry.encoded), leaves.fingerprint()]
        parts += [edit.to_plain() for edit in held.edits]
        parts += [(name, [codec.name for codec in tail]) for name, tail in held.tails.items()]
        parts += [(a.path, a.at, a.codec.name, asdict(a.codec)) for a in held.activations]  # type: ignore[call-overload]
    return parts


def cache_folder(path: Path | str | None) -> Path:
    """The folder of a cache, made if need be.

    Raises:
        OutputError: it is a file, or cannot be made.
    """
    folder = Path(path or ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the cache {str(folder)!r} cannot be made: {error.strerror or error}") from None
    return folder
