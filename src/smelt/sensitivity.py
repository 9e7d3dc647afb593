"""How much of its accuracy a model loses when one of its tensors alone is pruned, quantized, ...: layer by layer.

Every number is that of a file that was written and loaded again, as in `compress`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.compress import _copy, _Run, _source
from smelt.core import shelf
from smelt.core.cache import cache_folder, keys
from smelt.core.data import batch, samples
from smelt.core.errors import DataError, RecipeError, RuleError, nearest
from smelt.core.job import Job
from smelt.core.method import Codec, Method, Objective, make
from smelt.core.output import replacing
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step
from smelt.core.report import Point, Sensitivity
from smelt.core.source import Source
from smelt.core.store import store_of
from smelt.core.target import select, targets
from smelt.formats import smelt as smelt_file
from smelt.measure import metric_name
from smelt.measures.accuracy import evaluate, higher_is_better, unit_of

# Which setting varies, and through which values, where nothing else is said: the first of these that a method has.
VALUES: dict[str, tuple[float, ...]] = {
    "ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "bits": (2, 3, 4, 5, 6, 7, 8),
    "clusters": (2, 4, 8, 16, 32, 64),
}


def sensitivity(
    model: nn.Module | Source,
    job: Job,
    method: str = "prune.weights",
    *,
    setting: str | None = None,
    values: Sequence[float] = (),
    on: str | Sequence[str] = "*",
    limit: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Change each tensor alone by a method, write the file, load it, and take the metric on the test split.

    Args:
        model: it is not changed.
        job: its data (the test split, else valid, else train, is measured on), metric, device, seed and cache.
        method: a codec or rewrite on the shelf.
        setting: what varies; by default the first that the method has of `VALUES`.
        values: of the setting; by default those in `VALUES`.
        on: the tensors, as in a recipe.
        limit: samples of the split to use; None for all.
        progress: who is told how far it is.

    Raises:
        RecipeError: no such method, setting, value or tensor; a lossless codec or an objective.
        DataError: the job has no data.
        KeyboardInterrupt: with `job.cache`, the next call with the same arguments goes on where this one stopped.
    """
    return _Sweep(_source(model), job, method, setting, values, on, limit, progress or Progress()).run()


class _Sweep:
    def __init__(
        self,
        source: Source,
        job: Job,
        method: str,
        setting: str | None,
        values: Sequence[float],
        on: str | Sequence[str],
        limit: int | None,
        progress: Progress,
    ):
        if job.data is None or not job.data.splits():
            raise DataError("sensitivity is measured on data; give the job data")
        self.method, self.job, self.limit, self.progress = method, job, limit, progress
        self.setting, self.values = _varied(method, setting, values)
        splits = job.data.splits()
        self.split = next(name for name in ("test", "valid", "train") if name in splits)
        self.batches = _first(splits[self.split], limit) if limit else splits[self.split]
        first = Recipe.of([Step(self._act(self.values[0]))])
        self.run_of = _Run(source, first, job, progress)
        self.run_of._check()
        self.chosen = select(targets(self.run_of.given), on)
        known = keys(source, self.run_of.given, first, job) if job.cache is not None else None
        self.key = known[0] if known else None

    def _act(self, value: float) -> Method:
        return make(self.method, {self.setting: value})  # type: ignore[no-any-return]

    def run(self) -> Sensitivity:
        job, metric = self.job, self.job.metric
        self.progress.begin(1, 1, f"{self.method} on each tensor")
        with tempfile.TemporaryDirectory(prefix="smelt-") as scratch, torch.random.fork_rng(devices=[]):
            path = Path(scratch) / "one.smelt"
            before, size = self._point(None, path)
            found = Sensitivity(
                self.method, self.setting, metric_name(metric), unit_of(metric), higher_is_better(metric), before, size
            )
            total = len(self.chosen) * len(self.values)
            for i, target in enumerate(self.chosen):
                for j, value in enumerate(self.values):
                    steps = Recipe.of([Step(self._act(value), on=(glob.escape(target.name),))])
                    try:
                        measured, size = self._point(steps, path)
                        found.points.append(Point(target.name, value, size, measured))
                    except RuleError as error:
                        found.notes.append(f"{target.name}, {self.setting} {value:g}: {error}")
                    done = i * len(self.values) + j + 1
                    self.progress.advance(done, total, f"{target.name}, {self.setting} {value:g}")
        found.conditions = {
            "data": f"{job.data.name if job.data else ''}, split {self.split}",
            "samples": "all" if self.limit is None else str(self.limit),
            "device": job.device,
            "seed": str(job.seed),
            "torch": torch.__version__,
        }
        self.progress.end(f"{len(found.points)} files measured")
        return found

    def _point(self, recipe: Recipe | None, path: Path) -> tuple[float, int]:
        """(metric, bytes of the file) after a recipe on the model as it came, or of that model."""
        kept = self._kept(recipe)
        if kept is not None and kept.exists():
            try:
                known = json.loads(kept.read_text())
                return float(known["metric"]), int(known["bytes"])
            except (OSError, ValueError, KeyError, TypeError):
                kept.unlink(missing_ok=True)  # a damaged cache is no cache
        run = self.run_of
        model = _copy(run.given)
        store_of(model).source = run.source
        for index, step in enumerate(recipe or (), 1):
            run._act(step, f"{index}: {step.title}", model, path)
        size = smelt_file.save(model, path, force=True)
        loaded = run._load(path, model)
        value = evaluate(loaded, self.batches, self.job.metric, self.job.device, self.split)
        if kept is not None:
            text = json.dumps({"metric": value, "bytes": size}).encode()
            with replacing(kept, True, len(text)) as file:
                file.write(text)
        return value, size

    def _kept(self, recipe: Recipe | None) -> Path | None:
        if self.key is None:
            return None
        what = json.dumps([self.key, self.limit, self.split, None if recipe is None else recipe.to_plain()])
        return cache_folder(self.job.cache) / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.point"


def _varied(method: str, setting: str | None, values: Sequence[float]) -> tuple[str, tuple[float, ...]]:
    """The setting that varies, and its values."""
    cls = shelf.load("methods", method, Method)
    if issubclass(cls, Objective) or (issubclass(cls, Codec) and cls.lossless):
        raise RecipeError(f"{method} changes no values of a tensor; take a method such as prune.weights")
    known = [f.name for f in fields(cls)]
    name = setting or next((name for name in VALUES if name in known), None)
    if name is None:
        raise RecipeError(f"{method}: say which setting varies{nearest('', known)}")
    if name not in known:
        raise RecipeError(f"{method} has no setting {name!r}{nearest(name, known)}")
    chosen = tuple(values) or VALUES.get(name, ())
    if not chosen:
        raise RecipeError(f"{method}.{name}: give the values that it takes")
    return name, tuple(dict.fromkeys(int(v) if float(v).is_integer() else v for v in chosen))


def _first(loader: Iterable[Any], limit: int) -> list[Any]:
    """Batches with the first `limit` samples."""
    kept: list[Any] = []
    for item in loader:
        inputs, labels = batch(item)
        number = samples(inputs)
        if number > limit:
            inputs, labels = (_cut(tree, number, limit) for tree in (inputs, labels))
        kept.append((inputs, labels))
        limit -= min(number, limit)
        if not limit:
            break
    return kept


def _cut(tree: Any, number: int, limit: int) -> Any:
    """The same nesting with the first samples of every tensor that has as many."""
    if isinstance(tree, torch.Tensor):
        return tree[:limit] if tree.dim() and len(tree) == number else tree
    if isinstance(tree, dict):
        return {k: _cut(v, number, limit) for k, v in tree.items()}
    return type(tree)(_cut(v, number, limit) for v in tree) if isinstance(tree, (tuple, list)) else tree
