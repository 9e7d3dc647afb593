"""Files and the model they come from, each in every runtime that runs it, side by side.

Latency is taken in one process, all sides in turn; memory in a fresh process for each.  Outputs and the metric are
those of the files, loaded in their runtimes.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.compress import processor
from smelt.core import shelf
from smelt.core.bench import Bench, Side, Timed
from smelt.core.clock import timings
from smelt.core.data import Data, batch, check_data, forward, forward_or_raise, move, samples, tensors
from smelt.core.errors import DataError, FileError, ModelError, RecipeError, SmeltError
from smelt.core.export import export, format_of, formats
from smelt.core.progress import Progress
from smelt.core.runtime import (
    Filled,
    Session,
    open_session,
    parts_of,
    runtime,
    runtimes_for_modules,
    runtimes_of,
    sized,
)
from smelt.core.source import Source
from smelt.formats import smelt as smelt_file
from smelt.formats._file import File
from smelt.measure import examples, metric_name
from smelt.measures.accuracy import evaluate, unit_of
from smelt.measures.bytes import checkpoint_bytes
from smelt.measures.difference import difference
from smelt.models._open import open_model
from smelt.runtimes._fresh import fresh_memory

ORIGINAL = "original"
SMELT = ".smelt"
TOLERANCE = 20.0  # dB: the difference is a tenth of the outputs, root mean square


def bench(
    files: Iterable[str | Path],
    *,
    original: nn.Module | Source | None = None,
    data: Data | None = None,
    inputs: Any = None,
    metric: str | Callable[..., Any] = "accuracy",
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    repeats: int = 30,
    warmup: int = 5,
    memory: bool = True,
    tolerance: float = TOLERANCE,
    device: str = "cpu",
    trust: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Run every file in every runtime that is installed and runs it, beside the original model.

    The outputs that others are compared with are those of the original, else of the first file.  Where a file is of
    another kind than `.smelt`, the original is exported to that kind with its default settings, too.

    Args:
        files: `.smelt` files and what `smelt.export` writes.
        original: the model before it was compressed; by default the first `.smelt` file's builder makes it anew, with
            random weights, and it is only timed.
        data: the first batch of its test split is run; labels there give the metric.
        inputs: of one batch, as the model takes them, in place of data.
        metric: as `smelt.Job` takes it.
        runtimes: names; () = all.
        batches, threads: numbers that are timed, each with each.
        repeats, warmup: runs of each side that are timed, after those that are not.
        memory: whether to measure it, in a fresh process for each side.
        tolerance: dB; outputs whose signal-to-noise ratio is less are warned of.
        trust: let a `.smelt` file name any function as its builder.  That runs code!

    Raises:
        RecipeError: no such runtime, one that is named and not installed, none that runs any of the files, numbers.
        DataError: neither data nor inputs.
        FileError: no such file.
    """
    run = _Run(
        [Path(file) for file in files], data, metric, tuple(runtimes), tuple(batches), tuple(threads),
        repeats, warmup, memory, tolerance, device, trust, progress or Progress(),
    )  # fmt: skip
    return run.bench(original, inputs)


@dataclass
class _Artifact:
    """What is run, and how a fresh process gets it: keywords of `_source`; None: it cannot."""

    name: str
    source: Path | nn.Module
    bytes: int
    runtimes: list[str]
    original: bool = False
    random: bool = False
    again: dict[str, Any] | None = None


@dataclass
class _Run:
    files: list[Path]
    data: Data | None
    metric: str | Callable[..., Any]
    runtimes: tuple[str, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    repeats: int
    warmup: int
    memory: bool
    tolerance: float
    device: str
    trust: bool
    progress: Progress
    found: Bench = field(default_factory=Bench)
    outputs: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def bench(self, original: nn.Module | Source | None, inputs: Any) -> Bench:
        self._check()
        if inputs is None:
            inputs = examples(self.data)
        if inputs is None:
            raise DataError("what is run needs inputs; give data, or inputs of one batch")
        self.inputs = move(inputs, self.device)
        with tempfile.TemporaryDirectory(prefix="smelt-") as scratch, torch.random.fork_rng(devices=[]):
            artifacts = self._artifacts(original, Path(scratch))
            stages = len(self.threads) + self.memory
            for stage, threads in enumerate(self.threads, 1):
                self.progress.begin(stage, stages, f"latency, outputs, {threads} thread{'s' * (threads > 1)}")
                self._run(artifacts, threads, first=stage == 1)
                self.progress.end(f"{len(self.found.sides)} sides")
            if not any(side.timed for side in self.found):
                raise ModelError("; ".join(f"{side.name}: {side.failed}" for side in self.found))
            if self.memory:
                self.progress.begin(stages, stages, "memory, in fresh processes")
                self._memory(artifacts)
                self.progress.end("done")
        self._conditions()
        self._compare()
        self._warn()
        return self.found

    def _check(self) -> None:
        check_data(self.data)
        if not self.files:
            raise FileError("no file to run")
        for name, values in (("batches", self.batches), ("threads", self.threads)):
            if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
                raise RecipeError(f"{name} is {values!r}; it takes whole numbers from 1")
        for name in self.runtimes:
            if why := runtime(name).missing():
                raise RecipeError(f"the runtime {name} cannot be used here: {why}")

    def _artifacts(self, original: nn.Module | Source | None, scratch: Path) -> list[_Artifact]:
        first = self._original(original)
        into = None if original is None else first
        made = [self._artifact(path, into) for path in dict.fromkeys(self.files)]
        if not any(artifact.runtimes for artifact in made):
            able = sorted({name for path in self.files for name in runtimes_of(path.suffix)})
            one = str(self.files[0])
            if not able:
                known = {suffix for name in shelf.names("runtimes") for suffix in runtime(name).SUFFIXES}
                raise RecipeError(f"no runtime runs {one!r}; they run {', '.join(sorted(known))}")
            whys = "; ".join(f"{n}: {runtime(n).missing() or 'not among those asked for'}" for n in able)
            raise RecipeError(f"nothing here runs {one!r}: {whys}")
        if first is None:
            return made
        return [first, *self._exported(first, scratch), *made]

    def _usable(self, able: Sequence[str]) -> list[str]:
        """Those of the runtimes that are wanted and installed, eager first; those that are missing are noted."""
        usable = []
        for name in sorted(able, key=lambda n: (n != "eager", n)):
            if self.runtimes and name not in self.runtimes:
                continue
            if why := runtime(name).missing():
                self.found.missing[name] = why
            else:
                usable.append(name)
        return usable

    def _artifact(self, path: Path, into: _Artifact | None) -> _Artifact:
        if not path.exists():
            raise FileError(f"no such file: {str(path)!r}")
        size = sum(part.stat().st_size for part in parts_of(path))
        again: dict[str, Any] | None = {"file": str(path.resolve())}
        if path.suffix != SMELT or _builder(path)[0] in shelf.names("models"):
            return _Artifact(str(path), path, size, self._usable(runtimes_of(path.suffix)), again=again)
        given = None
        if into is not None:
            assert isinstance(into.source, nn.Module)
            given, again = copy.deepcopy(into.source), into.again and {"file": str(path.resolve()), "into": into.again}
        module = smelt_file.load(path, given, trust=self.trust)
        return _Artifact(str(path), module, size, self._usable(runtimes_for_modules()), again=again)

    def _original(self, given: nn.Module | Source | None) -> _Artifact | None:
        """The model before it was compressed: the one given, or what the first file's builder makes."""
        random = given is None
        if given is None:
            given = self._rebuilt()
        source = Source.of(given) if given is not None else None
        if source is None or source.module is None:
            return None
        if source.builder is None:
            self.found.notes.append("the memory of the original: unknown, as no builder is named that makes it anew")
        again = {"builder": source.builder, "arguments": dict(source.arguments)} if source.builder else None
        module = copy.deepcopy(source.module).eval()
        size = checkpoint_bytes(module)
        return _Artifact(ORIGINAL, module, size, self._usable(runtimes_for_modules()), True, random, again)

    def _rebuilt(self) -> Source | None:
        for path in self.files:
            if path.suffix != SMELT or not path.is_file():
                continue
            builder, arguments = _builder(path)
            if builder in shelf.names("models") or (builder is not None and self.trust):
                module, name, arguments = open_model(builder, arguments=arguments)
                self.found.notes.append(
                    f"the original is {name} with random weights: it is timed, and its outputs mean nothing"
                )
                return Source.of(module, name, arguments)
        return None

    def _exported(self, first: _Artifact, scratch: Path) -> list[_Artifact]:
        """The original in the formats of the files that are not ours."""
        made = []
        assert isinstance(first.source, nn.Module)
        for suffix in dict.fromkeys(path.suffix for path in self.files):
            usable = self._usable(runtimes_of(suffix))
            able = [name for name in formats() if format_of(name).suffix == suffix and not format_of(name).missing()]
            if not suffix or suffix == SMELT or not usable or not able:
                continue
            path = scratch / f"{ORIGINAL}{suffix}"
            try:
                export(first.source, able[0], path, example=self.inputs, data=self.data)
            except SmeltError as error:
                self.found.notes.append(f"the original was not exported to {able[0]}: {error}")
                continue
            size = sum(part.stat().st_size for part in parts_of(path))
            made.append(_Artifact(ORIGINAL, path, size, usable, True, first.random, {"file": str(path)}))
        return made

    def _run(self, artifacts: Sequence[_Artifact], threads: int, first: bool) -> None:
        sessions: list[tuple[Side, Session]] = []
        for artifact in artifacts:
            for name in artifact.runtimes:
                side = self._side(artifact, name)
                try:
                    session = open_session(name, artifact.source, threads, self.device)
                    if session.batch in (None, self.batches[0]):  # some choose by what they see first
                        forward_or_raise(session, sized(self.inputs, self.batches[0]), f"in {side.name}")
                    if first:
                        self._outputs(side, artifact, session)
                    sessions.append((side, session))
                except SmeltError as error:
                    side.failed = str(error)
        for size in self.batches:
            self._time(sessions, size, threads)

    def _side(self, artifact: _Artifact, name: str) -> Side:
        with suppress(KeyError):
            return self.found.side(artifact.name, name)
        self.found.sides.append(Side(artifact.name, name, artifact.bytes, artifact.original))
        return self.found.sides[-1]

    def _time(self, sessions: Sequence[tuple[Side, Session]], size: int, threads: int) -> None:
        inputs = sized(self.inputs, size)
        calls = {}
        for side, session in sessions:
            if session.batch not in (None, size):
                self.found.notes.append(f"{side.name}: takes {session.batch} samples at once, and not {size}")
                continue
            try:
                forward_or_raise(session, inputs, f"in {side.name}")
            except SmeltError as error:
                self.found.notes.append(f"batch {size}: {error}")
                continue
            calls[side.name] = partial(forward, session, inputs)
        taken = timings(calls, self.repeats, self.warmup, settle=1) if calls else {}
        for side, _ in sessions:
            if side.name in taken:
                side.timed.append(Timed(size, threads, taken[side.name]))

    def _outputs(self, side: Side, artifact: _Artifact, session: Session) -> None:
        """The outputs of the first batch, and the metric on the test split."""
        if artifact.random:
            return
        model = Filled(session, samples(self.inputs))
        outputs = forward_or_raise(model, self.inputs, f"in {side.name}")
        self.outputs[side.name] = tuple(t.detach().cpu().double() for t in tensors(outputs))
        if self.data is None or self.data.test is None:
            return
        if batch(next(iter(self.data.test)))[1] is None:
            return
        self.found.metric, self.found.unit = metric_name(self.metric), unit_of(self.metric)
        try:
            side.metric = evaluate(model, self.data.test, self.metric, self.device)
        except DataError as error:
            self.found.notes.append(f"{side.name}: {error}")

    def _memory(self, artifacts: Sequence[_Artifact]) -> None:
        if self.device != "cpu":
            self.found.notes.append(f"memory: not measured on {self.device}")
            return
        sides = [(a, self._side(a, name)) for a in artifacts for name in a.runtimes]
        sides = [(a, side) for a, side in sides if side.timed]
        for count, (artifact, side) in enumerate(sides, 1):
            if artifact.again is not None:
                inputs = sized(self.inputs, side.timed[0].batch)
                try:
                    side.memory = fresh_memory(artifact.again, side.runtime, inputs, self.threads[0], self.trust)
                except SmeltError as error:
                    self.found.notes.append(f"{side.name}: {error}")
            self.progress.advance(count, len(sides), side.name)

    def _compare(self) -> None:
        found = self.found
        ran = [side for side in found if side.timed]
        eager = [side for side in ran if side.original and side.runtime == "eager"]
        found.baseline = (eager or [s for s in ran if s.original] or ran)[0].name
        found.reference = next((side.name for side in ran if side.name in self.outputs), "")
        for side in ran:
            if side.name in self.outputs and found.reference:
                side.error, side.sqnr = difference(self.outputs[found.reference], self.outputs[side.name])

    def _warn(self) -> None:
        found = self.found
        for side in found:
            if side.failed is not None:
                found.warnings.append(f"{side.name} did not run: {side.failed}")
            for one in side.timed:
                self._warn_slow(side, one)
            if side.name == found.reference or side.sqnr is None:
                continue
            if math.isnan(side.sqnr):
                found.warnings.append(
                    f"{side.name}: its outputs are not finite, or of another shape than those of {found.reference}"
                )
            elif side.sqnr < self.tolerance:
                found.warnings.append(
                    f"{side.name}: its outputs differ from those of {found.reference}: {side.sqnr:.1f} dB, and "
                    f"{self.tolerance:g} dB or more are asked for"
                )

    def _warn_slow(self, side: Side, one: Timed) -> None:
        """Slower than the original in the same runtime, or else than the baseline: by more than the spread."""
        same = [s for s in self.found if s.original and s.runtime == side.runtime and s.at(one.batch, one.threads)]
        base = [s for s in self.found if s.name == self.found.baseline]
        for other in [] if side.original else (same or base)[:1]:
            timed = other.at(one.batch, one.threads)
            if timed is None or other is side:
                continue
            cost, before = self.found.cost(one), self.found.cost(timed).median
            if cost.low <= before:
                continue
            times = cost.median / before
            what = "the original" if other.original else other.file
            where = f"batch {one.batch}, {one.threads} thread{'s' * (one.threads > 1)}"
            self.found.warnings.append(
                f"{side.name} is {times:.2f} times slower than {what} in {other.runtime} ({where})"
            )

    def _conditions(self) -> None:
        names = dict.fromkeys(side.runtime for side in self.found if side.timed)
        known = {"processor": processor(), "device": self.device, "torch": torch.__version__}
        for name in names:
            with suppress(PackageNotFoundError):
                known[name] = version(name)
        known |= {"runs of each, in turn": str(self.repeats)}
        if self.data is not None:
            known["data"] = self.data.name
        self.found.conditions = known


def _builder(path: Path) -> tuple[str | None, dict[str, Any]]:
    with File(path) as file:
        return file.builder, dict(file.arguments)
