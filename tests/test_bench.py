"""smelt.bench: every number against doing it by hand; runtimes that are there, and those that are not."""

import io
import json
import math
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import smelt
from smelt.core import runtime as runtimes
from smelt.core import shelf
from smelt.core.bench import Bench
from smelt.core.errors import DataError, FileError, ModelError, RecipeError
from smelt.core.runtime import Filled, Session, open_session, parts_of, runtimes_of, sized
from smelt.core.store import strip
from smelt.measures.accuracy import evaluate
from smelt.measures.difference import difference
from smelt.reports import bench as report

BUILD = "lenet300(inputs=64, hidden=(48, 32))"


@pytest.fixture(scope="module")
def data() -> smelt.Data:
    return smelt.open_data("digits(held_out=0.2)")


@pytest.fixture(scope="module")
def original() -> smelt.Source:
    torch.manual_seed(0)
    module, builder, arguments = smelt.open_model(BUILD)
    return smelt.Source.of(module.eval(), builder, arguments)


@pytest.fixture(scope="module")
def stored(original: smelt.Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 3-bit weights."""
    path = tmp_path_factory.mktemp("bench") / "net.smelt"
    result = smelt.compress(original, [{"quantize.affine": {"bits": 3}}], smelt.Job(latency=False))
    result.save(path)
    return path


def in_onnx(module: nn.Module, path: Path, scale: float = 1.0) -> Path:
    """A chain of linear layers and ReLUs as a graph, by hand; the outputs times `scale`."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    nodes = [onnx.helper.make_node("Flatten", ["x"], ["h0"])]
    weights = []
    for i, layer in enumerate(linear):
        last = i == len(linear) - 1
        for name, value in (("w", layer.weight), ("b", layer.bias)):
            array = value.detach().numpy() * (scale if last else 1.0)
            weights.append(onnx.numpy_helper.from_array(array.astype(np.float32), f"{name}{i}"))
        out = "y" if last else f"z{i}"
        nodes.append(onnx.helper.make_node("Gemm", [f"h{i}", f"w{i}", f"b{i}"], [out], transB=1))
        if not last:
            nodes.append(onnx.helper.make_node("Relu", [out], [f"h{i + 1}"]))
    number = onnx.TensorProto.FLOAT
    x = onnx.helper.make_tensor_value_info("x", number, ["n", 1, 8, 8])
    y = onnx.helper.make_tensor_value_info("y", number, ["n", 10])
    graph = onnx.helper.make_graph(nodes, "net", [x], [y], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def put(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A runtime of one's own on the shelf."""
    made = ModuleType(f"tests.runtime_{name}")
    vars(made).update({"SUFFIXES": (".fake",), "missing": lambda: None, **members})
    monkeypatch.setitem(__import__("sys").modules, made.__name__, made)
    monkeypatch.setitem(shelf._registered.setdefault("runtimes", {}), name, made.__name__)


def quick(files: list[Path], **given: object) -> Bench:
    return smelt.bench(files, **{"repeats": 3, "warmup": 1, "memory": False, "runtimes": ["eager"], **given})  # type: ignore[arg-type]


def test_a_stored_model_beside_its_original(original: smelt.Source, stored: Path, data: smelt.Data) -> None:
    found = quick([stored], original=original, data=data, batches=[1, 4], threads=[1, 2], memory=True)
    assert [side.name for side in found] == ["original, eager", f"{stored}, eager"]
    first, second = found
    assert found.reference == found.baseline == first.name and first.original and not second.original
    assert second.bytes == stored.stat().st_size < first.bytes / 5
    assert found.settings() == [(1, 1), (1, 2), (4, 1), (4, 2)]
    for side in found:
        assert side.memory is not None and side.memory > 100_000
        for one in side.timed:
            spread = one.timing.wall
            assert 0 < spread.low <= spread.median <= spread.high and spread.repeats == 3
            assert one.timing.cpu.median > 0
            assert one.throughput == pytest.approx(one.batch / spread.median * 1000)
    module, loaded = original.module, smelt.load(stored)
    assert module is not None and data.test is not None
    x = next(iter(data.test))[0]
    with torch.no_grad():
        a, b = module(x).double(), loaded(x).double()
    assert (first.error, first.sqnr) == (0.0, math.inf)
    assert second.error == pytest.approx(float((b - a).abs().max() / a.abs().max()))
    assert second.sqnr == pytest.approx(10 * math.log10(float(a.square().sum() / (b - a).square().sum())))
    assert found.metric == "accuracy" and found.unit == "%"
    assert first.metric == pytest.approx(evaluate(module, data.test, "accuracy"))
    assert second.metric == pytest.approx(evaluate(loaded, data.test, "accuracy"))
    json.dumps(found.to_plain(), allow_nan=False)


def test_without_an_original_the_builder_makes_one_to_time(stored: Path, data: smelt.Data) -> None:
    found = quick([stored], data=data)
    first, second = found
    assert first.original and first.timed and (first.metric, first.sqnr) == (None, None)
    assert found.baseline == first.name and found.reference == second.name and second.sqnr == math.inf
    assert any("random weights" in note for note in found.notes)
    assert not any("differ" in warning for warning in found.warnings)


def test_outputs_that_differ_are_warned_of(original: smelt.Source, stored: Path, data: smelt.Data) -> None:
    sqnr = quick([stored], original=original, data=data).sides[1].sqnr
    assert sqnr is not None and 3 < sqnr < 40
    for tolerance, number in ((sqnr - 1, 0), (sqnr + 1, 1)):
        found = quick([stored], original=original, data=data, tolerance=tolerance)
        assert len([w for w in found.warnings if f"{sqnr:.1f} dB" in w and str(stored) in w]) == number


def test_onnx_runtime(original: smelt.Source, stored: Path, data: smelt.Data, tmp_path: Path) -> None:
    good = in_onnx(smelt.load(stored), tmp_path / "good.onnx")
    wrong = in_onnx(smelt.load(stored), tmp_path / "wrong.onnx", scale=-1.0)
    found = quick([stored, good, wrong], data=data, runtimes=["eager", "onnxruntime"])
    same, other = found.side(str(good), "onnxruntime"), found.side(str(wrong), "onnxruntime")
    assert same.sqnr is not None and same.sqnr > 100 and same.metric == found.side(str(stored), "eager").metric
    assert other.sqnr == pytest.approx(20 * math.log10(0.5), abs=0.01) and other.error == pytest.approx(2, rel=1e-3)
    assert [w for w in found.warnings if "differ" in w] == [w for w in found.warnings if str(wrong) in w and "dB" in w]
    assert found.side("original", "onnxruntime").timed and found.baseline == "original, eager"
    assert same.bytes == good.stat().st_size
    alone = quick([good, wrong], inputs=torch.rand(2, 1, 8, 8), runtimes=["onnxruntime"])
    assert alone.baseline == alone.reference == f"{good}, onnxruntime" and not alone.metric
    assert quick([good], inputs=torch.rand(2, 1, 8, 8), runtimes=["onnxruntime"], memory=True).sides[0].memory


def test_a_slow_file_is_warned_of(
    original: smelt.Source, stored: Path, data: smelt.Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = {"now": 0.0}

    class Timed(Session):
        def __init__(self, cost: float):
            self.cost = cost

        def run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:  # type: ignore[override]
            clock["now"] += self.cost
            return [inputs[0].flatten(1) + 1]

    monkeypatch.setattr("smelt.core.clock.perf_counter", lambda: clock["now"])
    monkeypatch.setattr("smelt.core.clock.process_time", lambda: clock["now"])
    put(monkeypatch, "fake", open=lambda path, threads, device: Timed(float(path.read_text())))
    fast, slow = tmp_path / "fast.fake", tmp_path / "slow.fake"
    fast.write_text("1")
    slow.write_text("3")
    found = quick([fast, slow], data=data, runtimes=["fake"], batches=[2])
    assert found.baseline == f"{fast}, fake"
    assert [found.faster(side, 2, 1) for side in found] == pytest.approx([1, 1 / 3])
    assert found.warnings == [f"{slow}, fake is 3.00 times slower than {fast} in fake (batch 2, 1 thread)"]
    assert found.sides[0].timed[0].throughput == pytest.approx(2 / 1.0)
    text = io.StringIO()
    Console(file=text, width=120).print(report.table(found))
    assert f"WARNING: {slow}" in text.getvalue().replace("\n", " ").replace("  ", " ")


def test_runtimes_that_are_missing_are_named(stored: Path, data: smelt.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "absent", SUFFIXES=(".smelt", ".odd"), missing=lambda: "pip install 'smelt[absent]'")
    found = quick([stored], data=data, runtimes=["eager", "compiled"][:1])
    assert "absent" not in found.missing
    with pytest.raises(RecipeError, match=r"absent cannot be used here: pip install 'smelt\[absent\]'"):
        quick([stored], data=data, runtimes=["absent"])
    odd = stored.with_suffix(".odd")
    odd.write_bytes(b"")
    with pytest.raises(RecipeError, match=r"nothing here runs .*net.odd.*absent: pip install"):
        quick([odd], data=data, runtimes=())
    monkeypatch.setattr(runtimes.runtime("compiled"), "missing", lambda: "no compiler")
    put(monkeypatch, "fast", SUFFIXES=(".none",))
    found = quick([stored], data=data, runtimes=())
    assert found.missing == {"absent": "pip install 'smelt[absent]'", "compiled": "no compiler"}
    text = io.StringIO()
    Console(file=text, width=120).print(report.table(found))
    assert "missing: absent (pip install 'smelt[absent]')" in text.getvalue()


def test_a_file_whose_builder_is_not_ours(stored: Path, data: smelt.Data, tmp_path: Path) -> None:
    """It is loaded into the original."""
    original = smelt.load(stored)
    strip(original)
    path = tmp_path / "own.smelt"
    result = smelt.compress(original, [{"quantize.affine": {"bits": 8}}], smelt.Job(latency=False))
    result.save(path)
    found = quick([path], original=original, data=data)
    assert [side.name for side in found] == ["original, eager", f"{path}, eager"]
    assert found.sides[1].sqnr is not None and 30 < found.sides[1].sqnr < 80
    with pytest.raises(FileError, match="names no builder"):
        quick([path], data=data)


def test_what_fails_in_one_runtime_leaves_the_others(
    stored: Path, data: smelt.Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(path: Path, threads: int, device: str) -> Session:
        raise OSError("broken header\nand more")

    put(monkeypatch, "fake", open=fails)
    (tmp_path / "a.fake").write_text("")
    found = quick([stored, tmp_path / "a.fake"], data=data, runtimes=["eager", "fake"])
    broken = found.side(str(tmp_path / "a.fake"), "fake")
    assert broken.failed is not None and broken.failed.endswith("in the runtime fake: OSError: broken header")
    assert not broken.timed and found.side(str(stored), "eager").timed
    assert any("did not run" in warning for warning in found.warnings)
    with pytest.raises(ModelError, match="broken header"):
        quick([tmp_path / "a.fake"], data=data, runtimes=["fake"])


def test_a_file_of_a_fixed_batch(data: smelt.Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is timed at that number of samples only, and its metric is that of all samples."""

    class Fixed(Session):
        batch = 3

        def run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:  # type: ignore[override]
            assert len(inputs[0]) == 3
            return [inputs[0].flatten(1)[:, :10]]

    put(monkeypatch, "fake", open=lambda path, threads, device: Fixed())
    (tmp_path / "a.fake").write_text("")
    found = quick([tmp_path / "a.fake"], data=data, runtimes=["fake"], batches=[1, 3])
    assert found.settings() == [(3, 1)] and any("3 samples at once, and not 1" in note for note in found.notes)

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10]

    assert data.test is not None
    assert found.sides[0].metric == pytest.approx(evaluate(Same(), data.test, "accuracy"))


def test_a_filled_session_gives_what_one_call_does() -> None:
    class Sums(Session):
        names = ("x", "y")

        def run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:  # type: ignore[override]
            assert len(inputs[0]) == 4
            return [inputs[0] + inputs[1], inputs[0].sum(1)]

    x, y = torch.rand(10, 2), torch.rand(10, 2)
    for found in (Filled(Sums(), 4)(x, y), Filled(Sums(), 4)(y=y, x=x)):
        assert torch.equal(found[0], x + y) and torch.equal(found[1], x.sum(1))
    with pytest.raises(ModelError, match="it takes x, y"):
        Sums()(x, z=y)


def test_batches_of_a_size() -> None:
    x = torch.arange(3)
    assert sized(x, 2).tolist() == [0, 1] and sized(x, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sized(x, 2, 2).tolist() == [2, 2]
    found = sized({"a": x, "b": (torch.ones(3, 2), torch.tensor(5.0))}, 1)
    assert found["a"].tolist() == [0] and found["b"][0].shape == (1, 2) and found["b"][1] == 5


def test_differences_by_hand() -> None:
    x, y = torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.5])
    assert difference([x], [y]) == pytest.approx((0.5 / 4, 10 * math.log10(25 / 0.25)))
    assert difference([x], [x]) == (0.0, math.inf)
    assert all(math.isnan(v) for v in difference([x], [x[:1]]))
    assert all(math.isnan(v) for v in difference([x], [x / 0]))


@pytest.mark.skipif(runtimes.runtime("compiled").missing() is not None, reason="no C++ compiler")
def test_compiled_gives_what_eager_does() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    eager, compiled = (open_session(name, module) for name in ("eager", "compiled"))
    x = torch.randn(2, 4)
    assert torch.allclose(compiled(x), eager(x), atol=1e-6)  # type: ignore[arg-type]
    assert not compiled(x).requires_grad  # type: ignore[union-attr]


def test_eager_runs_on_the_threads_that_it_was_opened_with(stored: Path) -> None:
    seen: list[int] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(torch.get_num_threads())
            return {"logits": x}

    before = torch.get_num_threads()
    session = open_session("eager", Look(), threads=before + 1)
    assert torch.equal(session(torch.ones(2)), torch.ones(2)) and seen == [before + 1]  # type: ignore[arg-type]
    assert torch.get_num_threads() == before
    assert {"compiled", "eager"} <= set(runtimes_of(".smelt")) and parts_of(stored) == (stored,)
    shutil.copytree(stored.parent, folder := stored.parent / "folder", ignore=lambda *_: ["folder", "net.odd"])
    assert parts_of(folder) == (folder / "net.smelt",)
    with pytest.raises(RecipeError, match="does not run"):
        open_session("eager", folder / "net.onnx")


def test_what_is_wrong_is_said(stored: Path, data: smelt.Data, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs inputs"):
        quick([stored])
    with pytest.raises(FileError, match=r"no such file: .*gone.smelt"):
        quick([tmp_path / "gone.smelt"], data=data)
    with pytest.raises(RecipeError, match=r"no runtime runs .*a.txt.*\.smelt"):
        (tmp_path / "a.txt").write_text("")
        quick([tmp_path / "a.txt"], data=data, runtimes=())
    with pytest.raises(RecipeError, match=r"no runtime 'eagre'; did you mean 'eager'"):
        quick([stored], data=data, runtimes=["eagre"])
    with pytest.raises(RecipeError, match=r"batches is \(0,\); it takes whole numbers from 1"):
        quick([stored], data=data, batches=[0])


def test_the_page_has_every_number(original: smelt.Source, stored: Path, data: smelt.Data, tmp_path: Path) -> None:
    found = quick([stored], original=original, data=data, batches=[1, 4], tolerance=99)
    assert report.write(found, tmp_path / "page.html", title="net") == (tmp_path / "page.html").stat().st_size
    text = (tmp_path / "page.html").read_text()
    side = found.sides[1]
    for word in ("Batch 4, 1 thread", f"{side.sqnr:.1f} dB", f"{side.metric:.2f}%", "Warning: ", "<title>net</title>"):
        assert word in text
    assert "Recipe" not in text and text.count('"type": "log"') == 2
