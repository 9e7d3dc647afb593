"""The runner: the only loop over steps.

    recipe -> for each step: targets -> statistics -> plan -> act   (core/apply.py, train/loop.py)
                             write the file -> load it again -> measure -> rows of the report

Nothing is measured on the model in memory: after every step the file is written, loaded, and the loaded model is
measured and handed to the next step.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.core import data as data_module
from smelt.core import shelf
from smelt.core.allocate import apply_choice
from smelt.core.apply import all_kinds, apply_step
from smelt.core.cache import cache_folder, keys
from smelt.core.data import Batches, Data, batch, evaluating, forward_or_raise, move
from smelt.core.errors import ModelError, SmeltError
from smelt.core.job import Job
from smelt.core.method import Codec, Known, Lossless, Objective, Rewrite
from smelt.core.output import replacing
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe, Step
from smelt.core.report import Report, Row
from smelt.core.source import Source
from smelt.core.store import has_store, store_of, strip
from smelt.core.target import check_finite, check_usable, select, targets
from smelt.core.train import Recover, Train
from smelt.formats import smelt as smelt_file
from smelt.measure import conditions, examples, measure, metric_name
from smelt.measures.accuracy import evaluate, higher_is_better
from smelt.measures.bytes import checkpoint_bytes, file_bytes
from smelt.measures.latency import latency
from smelt.measures.macs import macs
from smelt.measures.parameters import parameters
from smelt.models._open import open_model
from smelt.models._pruned import LABEL, memo_of, take_over
from smelt.train.blocks import rebuild
from smelt.train.loop import Loop, fit, task_loss
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
    return _Run(_source(model), Recipe.of(recipe), job or Job(), progress or Progress()).run()


def _source(model: Any) -> Source:
    """Where a model comes from; one that was loaded from a file still knows its builder."""
    if isinstance(model, Source):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(f"compress takes a torch.nn.Module or a smelt.Source, not a {type(model).__name__}")
    known = store_of(model).source if has_store(model) else None
    if known is None or known.builder not in shelf.names("models"):
        return Source.of(model)
    return Source.of(model, known.builder, known.arguments)


class _Run:
    """One run: the state that its steps share."""

    def __init__(self, source: Source, recipe: Recipe, job: Job, progress: Progress):
        if source.module is None:
            raise ModelError("this source has no module to compress; give one, or a builder of one")
        self.source, self.recipe, self.job, self.progress = source, recipe, job, progress
        check_usable(source.module)
        self.given = _copy(source.module, memo_of(source.module))
        taken = take_over(self.given)
        self.given.to(job.device).eval()
        self.blank = self._bare()
        self.report = Report(recipe=recipe.to_plain())
        if taken:
            self.report.notes.append(f"0: {', '.join(taken)}: the masks of {LABEL} are stored, as sparse")
        self.tail = smelt_file.coders(tuple(s.act for s in recipe if isinstance(s.act, Lossless)))
        self.keys: list[str] | None = None
        self.last = Path()  # the file of the last step
        self.plain: Path | None = None  # of the last file in which nothing is stored in another form

    def run(self) -> Result:
        self._check()
        job = self.job
        if job.cache is not None:
            self.keys = keys(self.source, self.given, self.recipe, job)
            if self.keys is None:
                self.report.notes.append("nothing was cached: the data or the teacher cannot be recognised again")
        with tempfile.TemporaryDirectory(prefix="smelt-") as scratch, torch.random.fork_rng(devices=[]):
            folder = Path(scratch) if self.keys is None else cache_folder(job.cache)
            model = _copy(self.given)
            store_of(model).source = self.source
            self._note(self._measured(0, "original", model, checkpoint_bytes(model)), [])
            for index, step in enumerate(self.recipe, 1):
                self.progress.begin(index, len(self.recipe), step.title)
                model = self._step(index, step, model, folder)
                if not (store_of(model).entries or store_of(model).activations):
                    self.plain = self._stem(index, folder)
                self.progress.end(self._summary(index))
            model = self._finish(model, Path(scratch))
        return Result(model, self.report, self.recipe)

    def _bare(self) -> nn.Module:
        """The module as its builder made it, on the CPU, for files to be loaded into."""
        if not has_store(self.given) or not store_of(self.given).edits:
            bare = _copy(self.given).cpu()
            strip(bare)
            return bare
        if self.source.builder is None:
            raise ModelError(
                "this model's structure was changed before; give smelt.Source.of(model, builder, arguments)"
            )
        return open_model(self.source.builder, None, dict(self.source.arguments))[0]

    def _check(self) -> None:
        """Look at the weights, the first batch of every split and the selectors before any work is done."""
        check_finite(targets(self.given))
        data = self.job.data
        if data is not None:
            data_module.check(data, labels=False)
            for split, loader in data.splits().items():
                inputs, _ = batch(next(iter(loader)))
                with evaluating(self.given):
                    where = f"on batch 1 of the split {split!r}"
                    forward_or_raise(self.given, move(inputs, self.job.device), where)
            if data.test is not None:
                evaluate(self.given, [next(iter(data.test))], self.job.metric, self.job.device)
        for step in self.recipe:
            if any(isinstance(one.act, Rewrite) for one in (step, *step.pieces)):
                break  # what follows selects from another structure
            for one in (step, *step.pieces):
                if isinstance(one.act, Codec) or (isinstance(one.act, Objective) and one.act.needs_weights):
                    select(targets(self.given), one.on or "*", all_kinds=all_kinds(one))

    def _step(self, index: int, step: Step, model: nn.Module, folder: Path) -> nn.Module:
        """Act, write, load and measure; or take all of it from the cache."""
        label = f"{index}: {step.title}"
        stem = self._stem(index, folder)
        path, rows = stem.with_suffix(".smelt"), stem.with_suffix(".json")
        self.last = path
        if isinstance(step.act, Lossless):
            apply_step(model, step, label, Known(seed=self.job.seed), self.tail)
        if path.exists() and rows.exists():
            try:
                found, loaded = Report.from_plain(json.loads(rows.read_text())), self._load(path, model)
            except (SmeltError, OSError, ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)  # a damaged cache is no cache
            else:
                self._note(found.rows, found.notes)
                return loaded
        notes = self._act(step, label, model, stem)
        smelt_file.save(model, path, recipe=self.recipe.to_plain(), force=True)
        loaded = self._load(path, model)
        size = file_bytes(path)
        if isinstance(step.act, Lossless) and index > 1 and _same(model, loaded):
            taken = self._again(index, step.title, size)
        else:
            taken = self._measured(index, step.title, loaded, size)
        found = Report(taken, notes=notes)
        text = found.to_json().encode()
        with replacing(rows, True, len(text)) as file:
            file.write(text)
        self._note(found.rows, notes)
        return loaded

    def _stem(self, index: int, folder: Path) -> Path:
        """Path without suffix of what is written after a step."""
        return folder / (self.keys[index] if self.keys else str(index))

    def _original(self) -> nn.Module:
        return _copy(self.given) if self.plain is None else self._load(self.plain.with_suffix(".smelt"), self.given)

    def _note(self, rows: Sequence[Row], notes: Sequence[str]) -> None:
        self.report.rows += rows
        self.report.notes += notes

    def _act(self, step: Step, label: str, model: nn.Module, stem: Path) -> list[str]:
        train = self.job.data.train if self.job.data else None
        torch.manual_seed(self.job.seed)
        if isinstance(step.act, Train):
            loop = Loop(
                self.job.data or Data(),
                self.given if isinstance(step.act, Recover) else self.job.teacher or self.given,
                self.job.loss,
                self._score(),
                self.job.device,
                self.job.seed,
                stem.with_suffix(".training") if self.keys else None,
                self.tail,
                self.job.checkpoint,
                Path(self.job.log) if self.job.log else None,
                int(label.partition(":")[0]),
            )
            return (fit if step.act.scope == "model" else rebuild)(model, step, loop, self.progress)
        if isinstance(step.act, Lossless):
            return []
        if isinstance(train, Batches):
            train.set_epoch(0)
        loss = self.job.loss or task_loss
        known = Known(train, loss, self._prices(), seed=self.job.seed, original=self._original)
        act = apply_step if step.choice is None else apply_choice
        return act(model, step, label, known, self.tail)

    def _prices(self) -> dict[str, Callable[[nn.Module], float]]:
        """What a method may ask of a candidate; each is one of the measures, so it costs as much as measuring."""
        inputs = examples(self.job.data, self.job.device)
        prices: dict[str, Callable[[nn.Module], float]] = {"parameters": parameters, "bytes": self._size}
        if inputs is not None:
            prices["macs"] = lambda model: macs(model, inputs)
            prices["milliseconds"] = lambda model: latency(model, inputs, threads=self.job.threads).median
        return prices

    def _size(self, model: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return smelt_file.save(model, Path(folder) / "candidate.smelt")

    def _load(self, path: Path, model: nn.Module) -> nn.Module:
        """The written file as a module, with what a file does not keep: source, names of the steps, lossless tails."""
        loaded = smelt_file.load(path, into=_copy(self.blank)).to(self.job.device)
        old, new = store_of(model), store_of(loaded)
        new.source, new.tails = self.source, dict(old.tails)
        for name, entry in new.entries.items():
            if name in old.entries:
                entry.steps = old.entries[name].steps
        return loaded

    def _finish(self, model: nn.Module, scratch: Path) -> nn.Module:
        """Write the final file, with the report inside, and make sure that it is the model that was measured."""
        path = scratch / "final.smelt"
        size = smelt_file.save_again(self.last, path, recipe=self.recipe.to_plain(), report=self.report.short())
        final = self._load(path, model)
        if not _same(model, final):
            raise ModelError("the model is not the same after saving and loading; please report this")
        last = max(row.step for row in self.report.rows)
        self.report.rows = [
            replace(row, value=size) if row.step == last and row.measure == "file" else row for row in self.report.rows
        ]
        self.report.layers = _layers(smelt_file.show(path), final)
        self._conditions()
        return final

    def _measured(self, index: int, after: str, model: nn.Module, size: int) -> list[Row]:
        """Rows of one step, taken on a model that was loaded from its file (step 0: the model as it came)."""
        job = self.job
        torch.manual_seed(job.seed)
        return measure(
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

    def _again(self, index: int, after: str, size: int) -> list[Row]:
        """Rows of a model that is, to the bit, the one of the step before: only the size of its file is new."""
        rows = [row for row in self.report.rows if row.step == index - 1]
        return [
            replace(row, step=index, after=after, value=size if row.measure == "file" else row.value) for row in rows
        ]

    def _summary(self, index: int) -> str:
        found = {row.measure: row for row in self.report.rows if row.step == index}
        text = f"{found['file'].value:,.0f} bytes"
        metric = found.get(metric_name(self.job.metric))
        return text if metric is None else f"{text}, {metric.measure} {metric.value:.2f}{metric.unit}"

    def _score(self) -> Callable[[nn.Module, Iterable[Any]], float]:
        """The metric where its direction is known, else the negative of the loss that is trained."""
        job, better = self.job, higher_is_better(self.job.metric)
        if better is not None:
            sign = 1.0 if better else -1.0
            return lambda model, loader: sign * evaluate(model, loader, job.metric, job.device, "held out")
        loss = job.loss or task_loss

        def trained(outputs: Any, labels: Any) -> float:
            return float(loss(outputs, labels))

        return lambda model, loader: -evaluate(model, loader, trained, job.device, "held out")

    def _conditions(self) -> None:
        job = self.job
        self.report.conditions = {
            "date": date.today().isoformat(),
            **conditions(self.report.rows, job.data, job.device),
            "smelt": __version__,
            "python": platform.python_version(),
            "machine": processor(),
            "data": job.data.name if job.data else "none",
            "seed": str(job.seed),
            "file, step 0": "the model as a safetensors checkpoint, floats as fp32",
            "latency": "one forward of a batch; median and quartiles of 30 after 5 to warm up",
            "peak memory": "live tensors (weights, inputs, activations) during one forward of a batch",
        }
        if any(row.simulated for row in self.report.rows):
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


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have equal tensors, at the same places."""
    pairs = zip(targets(a), targets(b), strict=True)
    return all(x.name == y.name and torch.equal(x.tensor.nan_to_num(), y.tensor.nan_to_num()) for x, y in pairs)


def _copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}); give smelt.Source(builder=...) instead"
        ) from None


def processor() -> str:
    """What the numbers were taken on, e.g. 'AMD EPYC 9B45, 2 cores'."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
