"""The runner: the only loop over steps.

    recipe -> for each step: targets -> statistics -> plan -> act   (core/apply.py, train/loop.py)
                             write the file -> load it again -> measure -> rows of the report

Nothing is measured on the model in memory: after every step the file is written, loaded, and the loaded model is
measured and handed to the next step.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.core import data as data_module
from smelt.core.apply import apply_step, chosen
from smelt.core.data import Data, samples
from smelt.core.errors import ModelError, SmeltError
from smelt.core.job import Job
from smelt.core.method import Lossless
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step, Train
from smelt.core.report import Report, Row
from smelt.core.source import Source
from smelt.core.store import store_of
from smelt.core.target import check_finite, targets
from smelt.formats import smelt as smelt_file
from smelt.measure import examples, measure, metric_name
from smelt.measures.accuracy import evaluate, higher_is_better
from smelt.measures.bytes import checkpoint_bytes
from smelt.models._open import open_model
from smelt.train.loop import Loop, fit
from smelt.version import __version__


@dataclass
class Result:
    """What `compress` gives back.

    model: the compressed module, loaded from the written file.
    report: what was measured, before and after every step.
    """

    model: nn.Module
    report: Report
    recipe: Recipe

    def save(self, path: str | Path, *, force: bool = False) -> int:
        """Write the `.smelt` file that was measured; returns its bytes.

        Raises:
            OutputError: the path exists (and not `force`), or cannot be written; nothing is left half-written.
        """
        return smelt_file.save(self.model, path, recipe=self.recipe.to_plain(), report=self.report.short(), force=force)


def compress(
    model: nn.Module | Source,
    recipe: Any,
    job: Job | None = None,
    *,
    progress: Progress | None = None,
) -> Result:
    """Run a recipe on a trained model.

    Args:
        model: any module, or a `Source` that also says how to build it; it is not changed.
        recipe: a path to a YAML file, YAML text, plain data, a list of methods, or a `Recipe`.
        job: data, metric, teacher, device and seed; see `Job`.
        progress: who is told how far it is.

    Raises:
        RecipeError, RuleError, ModelError, DataError, OutputError: one line that names what is wrong.
        KeyboardInterrupt: with `job.cache`, the next call with the same arguments goes on where this one stopped.
    """
    return _Run(Source.of(model), Recipe.of(recipe), job or Job(), progress or Progress()).run()


class _Run:
    """One run: the state that its steps share."""

    def __init__(self, source: Source, recipe: Recipe, job: Job, progress: Progress):
        if source.module is None:
            raise ModelError("this source has no module to compress; give one, or a builder of one")
        self.source, self.recipe, self.job, self.progress = source, recipe, job, progress
        self.given = source.module
        self.report = Report(recipe=recipe.to_plain())
        self.tail = tuple(s.act for s in recipe if isinstance(s.act, Lossless))
        self.examples: Any = None

    def run(self) -> Result:
        check_finite(targets(self.given))
        self._check_data()
        self.blank = self._bare()
        keep = Path(self.job.cache) if self.job.cache is not None and self._key(0) else None
        if self.job.cache is not None and keep is None:
            self.report.notes.append("nothing was cached: the data has no fingerprint")
        with tempfile.TemporaryDirectory(prefix="smelt-") as scratch:
            folder = keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            model = _copy(self.given)
            store_of(model).source = self.source
            self._measure(0, "original", model, checkpoint_bytes(model))
            for index, step in enumerate(self.recipe, 1):
                self.progress.begin(index, len(self.recipe), step.key)
                model = self._step(index, step, model, folder)
                self.progress.end(self._summary(index))
            model = self._finish(model, Path(scratch))
        return Result(model, self.report, self.recipe)

    def _bare(self) -> nn.Module:
        """The module as its builder made it, for files to be loaded into."""
        if not store_of(self.given).edits:
            bare = _copy(self.given)
            bare.__dict__.pop("_smelt", None)
            return bare
        if self.source.builder is None:
            raise ModelError(
                "this model's structure was changed before; give smelt.Source.of(model, builder, arguments)"
            )
        return open_model(self.source.builder, None, dict(self.source.arguments))[0]

    def _step(self, index: int, step: Step, model: nn.Module, folder: Path) -> nn.Module:
        """Act, write, load and measure; or take all of it from the cache."""
        label = f"{index}: {step.key}"
        stem = folder / f"{self._key(index) or index}"
        path, rows = stem.with_suffix(".smelt"), stem.with_suffix(".json")
        if path.exists() and rows.exists():
            try:
                kept = json.loads(rows.read_text())
                loaded = self._load(path, model, index)
            except (SmeltError, OSError, ValueError):
                path.unlink(missing_ok=True)  # a damaged cache is no cache
            else:
                found = Report.from_plain(kept)
                self.report.rows += found.rows
                self.report.notes += found.notes
                return loaded
        notes = self._act(step, label, model, stem)
        smelt_file.save(model, path, recipe=self.recipe.to_plain(), force=True)
        loaded = self._load(path, model, index)
        before = len(self.report.rows)
        self._measure(index, step.key, loaded, path.stat().st_size)
        found = Report(self.report.rows[before:], notes=notes)
        _write(rows, found.to_json())
        self.report.notes += notes
        return loaded

    def _act(self, step: Step, label: str, model: nn.Module, stem: Path) -> list[str]:
        train = self.job.data.train if self.job.data else None
        if isinstance(step.act, Train):
            loop = Loop(
                self.job.data or Data(),
                self.job.teacher or self.given,
                self.job.loss,
                self._score(),
                self.job.device,
                self.job.seed,
                stem.with_suffix(".training"),
            )
            return fit(model, step, loop, self.progress)
        return apply_step(model, step, label, batches=train, seed=self.job.seed, tail=self.tail)

    def _load(self, path: Path, model: nn.Module, index: int) -> nn.Module:
        """The written file as a module, with what a file does not keep: source, names of the steps, lossless tails."""
        loaded = smelt_file.load(path, into=_copy(self.blank)).to(self.job.device)
        old, new = store_of(model), store_of(loaded)
        new.source = self.source
        for name, entry in new.entries.items():
            if name in old.entries:
                entry.steps = old.entries[name].steps
        for step in self.recipe.steps[:index]:
            if isinstance(step.act, Lossless):
                for target in chosen(loaded, step, step.key)[0]:
                    new.tails[target.name] = (*new.tails.get(target.name, ()), step.act)
        return loaded

    def _finish(self, model: nn.Module, scratch: Path) -> nn.Module:
        """Write the final file, with the report inside, and make sure that it is the model that was measured."""
        path = scratch / "final.smelt"
        size = smelt_file.save(model, path, recipe=self.recipe.to_plain(), report=self.report.short())
        final = self._load(path, model, len(self.recipe))
        for a, b in zip(targets(model), targets(final), strict=True):
            if not torch.equal(a.tensor, b.tensor):
                raise ModelError(f"{a} is not the same after saving and loading; please report this")
        last = max(row.step for row in self.report.rows)
        self.report.rows = [
            Row(**{**asdict(row), "value": size}) if row.step == last and row.measure == "file" else row
            for row in self.report.rows
        ]
        self.report.layers = _layers(smelt_file.show(path), final)
        self._conditions()
        return final

    def _measure(self, index: int, after: str, model: nn.Module, size: int) -> None:
        """Rows of one step, taken on a model that was loaded from its file (step 0: the model as it came)."""
        job = self.job
        self.report.rows += measure(
            model,
            job.data,
            job.metric,
            device=job.device,
            latency=job.latency,
            threads=job.threads,
            size=size,
            step=index,
            after=after,
        )

    def _summary(self, index: int) -> str:
        found = {row.measure: row for row in self.report.rows if row.step == index}
        text = f"{found['file'].value:,.0f} bytes"
        metric = found.get(metric_name(self.job.metric))
        return text if metric is None else f"{text}, {metric.measure} {metric.value:.2f}{metric.unit}"

    def _score(self) -> Callable[[nn.Module, Iterable[Any]], float]:
        direction = higher_is_better(self.job.metric)
        metric = self.job.metric if direction is not None else "loss"
        sign = 1.0 if higher_is_better(metric) else -1.0
        return lambda model, loader: sign * evaluate(model, loader, metric, self.job.device, "held out")

    def _check_data(self) -> None:
        """Look at the first batches before any work is done."""
        if self.job.data is None:
            return
        data_module.check(self.job.data, labels=False)
        data = self.job.data
        self.examples = examples(data, self.job.device)
        if data.test is not None:
            first = [next(iter(data.test))]
            evaluate(self.given.to(self.job.device), first, self.job.metric, self.job.device)

    def _key(self, index: int) -> str:
        """What the state after step `index` depends on, hashed; '' when that cannot be known."""
        data = self.job.data
        teacher = self.job.teacher
        if (data is not None and data.fingerprint is None) or not (teacher is None or isinstance(teacher, nn.Module)):
            return ""
        if not hasattr(self, "_base"):
            guide = Source.of(teacher).fingerprint() if isinstance(teacher, nn.Module) else ""
            loss = getattr(self.job.loss, "__qualname__", "")
            parts = [
                self.source.fingerprint(),
                data.fingerprint if data else "",
                guide,
                loss,
                metric_name(self.job.metric),
            ]
            parts += [str(self.job.seed), self.job.device, str(self.job.latency), __version__, torch.__version__]
            self._base = "\n".join(str(p) for p in parts)
        return hashlib.sha256(f"{self._base}\n{self.recipe.prefix_hash(index)}".encode()).hexdigest()[:32]

    def _conditions(self) -> None:
        threads = self.job.threads or torch.get_num_threads()
        size = samples(self.examples) if self.examples is not None else 0
        self.report.conditions = {
            "date": date.today().isoformat(),
            "smelt": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": processor(),
            "device": self.job.device,
            "data": self.job.data.name if self.job.data else "none",
            "seed": str(self.job.seed),
            "file, step 0": "the model as a safetensors checkpoint, floats as fp32",
            "latency": f"forward of a batch of {size}, {threads} threads; median and quartiles of 30, after 5 to warm up",
            "peak memory": f"live tensors (weights, inputs, activations) during one forward of a batch of {size}",
        }
        stored = [e.encoded for e in store_of(self.given).entries.values()]
        if any(row.simulated for row in self.report.rows) or stored:
            self.report.notes.append(
                "rows marked simulated ran dense: no kernel serves what is stored, so it saves neither time nor memory"
            )


def _layers(shown: Mapping[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    """Per tensor: what it is stored as, in how many bytes, and its share of zeros."""
    by_name = {t.name: t.tensor for t in targets(model)}
    rows = []
    for entry in shown["tensors"]:
        tensor = by_name[entry["name"]]
        dense = tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        zeros = float((tensor == 0).float().mean()) if tensor.numel() else 0.0
        rows.append({**entry, "stored": entry["tree"], "dense_bytes": dense, "zeros": zeros})
    return rows


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}); give smelt.Source(builder=...) instead"
        ) from None


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def processor() -> str:
    """What the numbers were taken on, e.g. 'AMD EPYC 9B45, 2 cores'."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
