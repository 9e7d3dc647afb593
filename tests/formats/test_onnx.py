"""What is stored is in the file, in its bits, and ONNX Runtime computes what the stored model computes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smelt.core.apply import apply_step
from smelt.core.data import Data, forward
from smelt.core.errors import DataError, ModelError, OutputError, RecipeError
from smelt.core.export import Export, Exported, export, formats
from smelt.core.method import Known, State
from smelt.core.recipe import Recipe
from smelt.core.runtime import open_session
from smelt.core.store import Activation, store_of
from smelt.formats._onnx_static import Grid, grid_of
from smelt.methods.quantize.affine import Affine
from tests.formats import _nets

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'smelt[onnx]'")
numpy_helper = pytest.importorskip("onnx.numpy_helper")

INPUTS = {"quantize.affine": {"dynamic": False, "at": "input"}}


def stored(model: nn.Module, *steps: Any, batches: Any = None) -> nn.Module:
    for i, step in enumerate(Recipe.of(list(steps))):
        apply_step(model, step, f"{i + 1}: {step.title}", Known(batches), ())
    return model


def graph_of(path: Path) -> Any:
    return onnx.load(path).graph


def kinds(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def arrays(graph: Any) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}


def run(written: Exported, inputs: Any) -> Tensor:
    session = open_session("onnxruntime", written.path)
    found = session(*inputs) if isinstance(inputs, tuple) else session(inputs)
    assert isinstance(found, Tensor)
    return found


def error(written: Exported, model: nn.Module, inputs: Any) -> float:
    """Norm of the difference to the stored model, over that of its outputs."""
    with torch.no_grad():
        want = forward(model, inputs)
    found = run(written, inputs)
    assert found.shape == want.shape
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize("kind", _nets.KINDS)
def test_stored_weights_compute_what_the_model_computes(kind: str, tmp_path: Path) -> None:
    model = stored(_nets.net(kind), {"quantize.affine": {}})
    axes = [0, 1] if kind in ("transformer", "recurrent") else [0]
    example = _nets.inputs(kind, n=1)
    written = export(model, "onnx", tmp_path / "m.onnx", example=example, dynamic=axes, level=1)
    other = _nets.inputs(kind, n=5, seed=3)
    if len(axes) == 2:
        assert isinstance(other, Tensor)
        other = other[:, :7]
    assert error(written, model, other) < 1e-5
    graph = graph_of(written.path)
    dims = [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim]
    assert dims[: len(axes)] == ["batch", "sequence"][: len(axes)]
    floats = {n: x for n, x in arrays(graph).items() if x.dtype == np.float32 and x.squeeze().ndim > 1}
    assert all(n.endswith(".scales") for n in floats)  # biases are vectors
    assert bool(written.notes) == (kind in ("convolutional", "recurrent"))


class Wide(nn.Module):
    """A window that moves two places at a time over an image of odd size, as in the first layer of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.next = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.stem(x).relu()).relu()  # type: ignore[no-any-return]


def turned() -> nn.Module:
    """The convolutional net with a channel that its batch norm turns round and one that it switches off."""
    model = _nets.net("convolutional")
    norm = model.get_submodule("blocks.0.norm1")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.weight[0] *= -1
        norm.weight[1] = 0
        norm.bias[1] = 0.4
    return model


def test_static_convolutions_are_integers_throughout(tmp_path: Path) -> None:
    import onnxruntime

    batches = _nets.batches("convolutional")
    model = stored(turned(), {"quantize.affine": {}}, INPUTS, batches=batches)
    written = export(model, "onnx", tmp_path / "m.onnx", data=batches, activations="static")
    assert error(written, model, _nets.inputs("convolutional", n=3)) < 0.01
    assert not written.notes

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(written.path), options, providers=["CPUExecutionProvider"])
    run_as = kinds(graph_of(tmp_path / "optimized.onnx"))
    assert run_as["QLinearConv"] == 5 and run_as["QLinearAdd"] == 2 and run_as["QGemm"] == 1
    assert run_as["QLinearGlobalAveragePool"] == 1 and run_as["Conv"] == run_as["Relu"] == run_as["Clip"] == 0

    found = arrays(graph_of(written.path))
    entries = store_of(model).entries
    for name, entry in entries.items():
        codes = entry.encoded.parts["codes"]
        assert isinstance(codes, Tensor)
        want, mine = codes.numpy(), found[f"{name}.codes"]
        if name == "stem.weight":  # the image has a channel of zeros more
            assert not mine[:, 3:].any()
            mine = mine[:, :3]
        if name == "blocks.0.depthwise.weight":
            want = want.copy()
            want[0] *= -1
            want[1] = 0
        assert np.array_equal(mine, want), name
    scales = {float(x) for n, x in found.items() if n.startswith("scale_")}
    for activation in store_of(model).activations:
        assert float(activation.state.get_buffer("scale")) in scales


def test_images_are_laid_out_anew_without_a_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 15, 18)]
    model = stored(Wide().eval(), {"quantize.affine": {}}, INPUTS, batches=batches)
    written = export(model, "onnx", tmp_path / "m.onnx", data=batches, activations="static")
    assert kinds(graph_of(written.path))["SpaceToDepth"] == 1
    assert error(written, model, batches[0]) < 0.01


def test_a_decoder_with_a_mask_in_static_integers(tmp_path: Path) -> None:
    """What is added to the attention scores is -1e9 and must not be rounded."""
    batches = _nets.batches("transformer")
    model = stored(_nets.net("transformer"), {"quantize.affine": {}}, batches=batches)
    written = export(model, "onnx", tmp_path / "m.onnx", data=batches, activations="static", range="mse")
    assert error(written, model, _nets.inputs("transformer", n=3)) < 0.02
    count = kinds(graph_of(written.path))
    assert count["MatMulIntegerToFloat"] == count["QuantizeLinear"] == 9 and count["MatMul"] == 4
    assert written.bytes < 0.4 * sum(4 * p.numel() for p in model.parameters())


def test_ranges_found_at_run_time(tmp_path: Path) -> None:
    model = stored(_nets.net("transformer"), {"quantize.affine": {}})
    inputs = _nets.inputs("transformer")
    written = export(model, "onnx", tmp_path / "m.onnx", example=inputs, activations="dynamic")
    assert error(written, model, inputs) < 0.02
    count = kinds(graph_of(written.path))
    assert count["DynamicQuantizeLinear"] == count["MatMulInteger"] == 9
    codes = [
        n
        for n, x in arrays(graph_of(written.path)).items()
        if n.startswith("embed.weight") and x.ndim == 2 and x.shape[1] > 1
    ]
    assert codes == ["embed.weight.codes"]  # the embedding and the head share it


FORMS: dict[str, tuple[Any, ...]] = {
    "groups": ({"quantize.affine": {"bits": 4, "per": "group", "group": 32}},),
    "zeros": ({"quantize.affine": {"bits": 4, "per": "group", "group": 32, "symmetric": False, "zero": "whole"}},),
    "eight": ({"quantize.affine": {"bits": 8, "per": "group", "group": 32, "symmetric": False, "zero": "whole"}},),
    "fractions": ({"quantize.affine": {"bits": 4, "symmetric": False, "zero": "float"}},),
    "ragged": ({"quantize.affine": {"bits": 4, "per": "group", "group": 40}},),
    "shared": ({"share.kmeans": {"clusters": 16}},),
    "pruned": ({"prune.weights": {"ratio": 0.5}}, {"share.kmeans": {"clusters": 31}}),
    "sparse": ({"prune.weights": {"ratio": 0.5}}, {"quantize.affine": {}}),
    "sixteen": ({"quantize.float": {"format": "fp16"}},),
    "normal": ({"quantize.float": {"format": "nf", "group": 32}},),
    "vectors": ({"share.product": {}},),
    "ternary": ({"quantize.ternary": {}},),
    "binary": ({"quantize.binary": {}},),
    "planes": ({"quantize.binary": {"bases": 3}},),
    "fixed": ({"quantize.fixed": {"bits": 6}},),
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Exported, Tensor]:
    """One linear layer for every form, with a bias and without in turns."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for i, name in enumerate(FORMS):
        model.add_module(name, nn.Linear(96, 96, bias=i % 2 == 0))
    for name, steps in FORMS.items():
        for step in steps:
            ((key, settings),) = step.items()
            stored(model, {key: {**settings, "on": name}})
    x = torch.randn(6, 96)
    path = tmp_path_factory.mktemp("forms") / "m.onnx"
    return model.eval(), export(model.eval(), "onnx", path, example=x, level=1), x


def test_every_form_gives_its_values(many: tuple[nn.Module, Exported, Tensor]) -> None:
    model, written, x = many
    assert error(written, model, x) < 1e-5


@pytest.mark.parametrize(
    ("form", "kind", "most"),
    [
        ("groups", "packed", 0.16),
        ("zeros", "packed", 0.17),
        ("eight", "packed", 0.30),
        ("fractions", "codes", 0.16),
        ("ragged", "codes", 0.19),
        ("shared", "indices", 0.14),
        ("pruned", "indices", 0.26),
        ("sparse", "packed", 0.29),
        ("sixteen", "weight", 0.51),
        ("normal", "indices", 0.17),
        ("ternary", "packed", 0.16),
        ("binary", "indices", 0.16),
        ("planes", "indices", 0.23),
        ("fixed", "packed", 0.29),
    ],
)
def test_forms_are_in_the_file_in_their_bits(
    many: tuple[nn.Module, Exported, Tensor], form: str, kind: str, most: float
) -> None:
    _, written, _ = many
    own = [
        x for x in graph_of(written.path).initializer if x.name.startswith(f"{form}.weight") and "bias" not in x.name
    ]
    assert any(kind in x.name for x in own)
    assert sum(x.ByteSize() for x in own) <= most * 4 * 96 * 96 + 300


def test_products_of_factors_and_pruned_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)).eval()
    stored(model, {"lowrank.svd": {"ratio": 0.25, "on": "0"}}, {"quantize.affine": {}})
    x = torch.randn(4, 64)
    written = export(model, "onnx", tmp_path / "m.onnx", example=x, level=1)
    assert error(written, model, x) < 1e-5
    assert kinds(graph_of(written.path))["MatMulNBits"] == 3


def test_the_file_is_as_small_as_its_codes(tmp_path: Path) -> None:
    batches = _nets.batches("convolutional", count=1)
    model = stored(_nets.Convolutional(384).eval(), {"quantize.affine": {}}, INPUTS, batches=batches)
    written = export(model, "onnx", tmp_path / "m.onnx", data=batches, activations="static")
    assert written.bytes == (tmp_path / "m.onnx").stat().st_size
    assert written.bytes <= 0.28 * sum(4 * t.numel() for t in model.state_dict().values())


def test_grids_of_codecs() -> None:
    def grid(scale: float, zero: int | None = None, **settings: Any) -> Any:
        given = None if zero is None else torch.tensor(zero, dtype=torch.int32)
        return grid_of(Activation("m", "input", Affine(**settings), State(scale=torch.tensor(scale), zero=given)))

    assert grid(0.5, 3) == Grid(0.5, 3, 0, 255)
    assert grid(0.5, symmetric=True) == Grid(0.5, 128, 1, 255)
    assert grid(0.5, 3, bits=4) == Grid(0.5, 3, 0, 15) and grid(0.5, 3, bits=4).ends == (-1.5, 6.0)
    assert grid_of(Activation("m", "input", Affine(), State())) == "dynamic"
    assert grid_of(Activation("m", "input", Affine(per="token"), State())) is None
    channels = State(scale=torch.ones(4), zero=torch.zeros(4, dtype=torch.int32))
    assert grid_of(Activation("m", "input", Affine(per="channel"), channels)) is None


def test_a_runtime_session(tmp_path: Path) -> None:
    model, x = _nets.net("embedding"), _nets.inputs("embedding")
    written = export(model, "onnx", tmp_path / "m.onnx", example=x)
    session = open_session("onnxruntime", written.path)
    assert session.names == ("user", "items", "features") and session.batch is None
    named = dict(zip(session.names, x, strict=True))
    assert torch.equal(session(*x), session(**named))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="it takes 3: user, items, features"):
        session(x[0])
    with pytest.raises(ModelError, match="export the module first"):
        open_session("onnxruntime", model)
    with pytest.raises(ModelError, match="'cuda'"):
        open_session("onnxruntime", written.path, device="cuda")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


LINEAR = nn.Linear(4, 4)
X = torch.zeros(2, 4)
REFUSALS: dict[str, tuple[type[Exception], str, Callable[[Path], Any]]] = {
    "format": (RecipeError, "no format 'onx'.*'onnx'", lambda p: export(LINEAR, "onx", p / "m.onnx", example=X)),
    "setting": (RecipeError, "no setting 'lvel'.*'level'", lambda p: export(LINEAR, "onnx", p / "m.onnx", lvel=1)),
    "value": (
        RecipeError,
        "no choice 'sttic'.*'static'",
        lambda p: export(LINEAR, "onnx", p / "m.onnx", activations="sttic"),
    ),
    "axis": (
        RecipeError,
        r"dynamic is \[-1\]",
        lambda p: export(LINEAR, "onnx", p / "m.onnx", example=X, dynamic=[-1]),
    ),
    "suffix": (OutputError, "does not end in '.onnx'", lambda p: export(LINEAR, "onnx", p / "m.bin", example=X)),
    "example": (DataError, "needs an example", lambda p: export(LINEAR, "onnx", p / "m.onnx")),
    "data": (DataError, "needs data", lambda p: export(LINEAR, "onnx", p / "m.onnx", example=X, activations="static")),
    "empty": (
        DataError,
        "needs data",
        lambda p: export(LINEAR, "onnx", p / "m.onnx", example=X, data=Data(), activations="static"),
    ),
    "module": (ModelError, "not a str", lambda p: export("model", "onnx", p / "m.onnx", example=X)),  # type: ignore[arg-type]
    "branch": (
        ModelError,
        "cannot export the Branching",
        lambda p: export(Branching(), "onnx", p / "m.onnx", example=X),
    ),
    "shape": (
        ModelError,
        "cannot export the Linear, given float32",
        lambda p: export(LINEAR, "onnx", p / "m.onnx", example=X[:, :3]),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_nothing_behind(case: str, tmp_path: Path) -> None:
    kind, message, act = REFUSALS[case]
    with pytest.raises(kind, match=message):
        act(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export(LINEAR, "onnx", tmp_path / "m.onnx", example=X)
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "onnx" in formats()
    from smelt.formats.onnx import Onnx

    monkeypatch.setattr(Onnx, "needs", ("onnx", "no_such_package"))
    with pytest.raises(RecipeError, match=r"no_such_package not installed; pip install 'smelt\[onnx\]'"):
        export(LINEAR, "onnx", tmp_path / "m.onnx", example=X)
    assert issubclass(Onnx, Export)
