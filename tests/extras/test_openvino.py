"""OpenVINO: what is stored arrives in integers, and its kernels compute what the stored model does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smelt.core.data import forward_or_raise
from smelt.core.errors import ModelError
from smelt.core.export import export
from smelt.core.runtime import open_session, runtime
from tests.extras._stored import FOUR, int8, net, round_trip, run, stored
from tests.formats._nets import KINDS, batches, inputs


@pytest.fixture(autouse=True)
def installed() -> None:
    if why := runtime("openvino").missing():
        pytest.fail(why)


def operations(path: Path) -> list[tuple[str, str]]:
    """(kind, precision) of what the compiled model runs."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return [tuple(str(getattr(i[k], "value", i[k])) for k in ("layerType", "primitiveType")) for i in infos]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_dense(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(net(kind), kind, "openvino", tmp_path / "m.xml")
    assert error < 1e-5 and not made.notes


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_stored_grids(kind: str, tmp_path: Path) -> None:
    model = int8(kind)
    _, error = round_trip(model, kind, "openvino", tmp_path / "m.xml")
    assert error < 5e-3  # kernels for weights in integers alone round what enters them, too
    weights = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "m.bin").stat().st_size < 1.5 * weights


def test_convolutions_run_in_integers_with_our_grids(tmp_path: Path) -> None:
    model = int8("convolutional")
    _, error = round_trip(model, "convolutional", "openvino", tmp_path / "m.xml")
    assert error < 1e-5
    kernels = [name for kind, name in operations(tmp_path / "m.xml") if kind == "Convolution"]
    assert len(kernels) == 5 and all(name.lower().endswith("i8") for name in kernels)


def test_static_calibrates_sums_and_heads(tmp_path: Path) -> None:
    model = int8("convolutional", at_input=False)
    _, error = round_trip(model, "convolutional", "openvino", tmp_path / "m.xml", activations="static")
    assert 1e-5 < error < 0.03
    found = operations(tmp_path / "m.xml")
    assert all(name.lower().endswith("i8") for kind, name in found if kind == "Convolution")


@pytest.mark.parametrize(("kind", "share"), [("transformer", 1.0), ("embedding", 1.25)])
def test_four_bits_lie_in_four_bits(kind: str, share: float, tmp_path: Path) -> None:
    """Half a byte each; the rest are scales, zeros and biases, and where 16 do not divide the row more scales."""
    model = stored(kind, FOUR)
    _, error = round_trip(model, kind, "openvino", tmp_path / "m.xml")
    assert error < 5e-3
    assert 'element_type="u4"' in (tmp_path / "m.xml").read_text()
    weights = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "m.bin").stat().st_size < share * weights


def test_any_number_of_samples(tmp_path: Path) -> None:
    model = int8("convolutional")
    one = inputs("convolutional", 1)
    export(model, "openvino", tmp_path / "m.xml", example=one)
    session = open_session("openvino", tmp_path / "m.xml")
    for n in (1, 3, 2, 4, 5, 6, 3):  # more than it is compiled for one by one
        x = inputs("convolutional", n)
        with torch.no_grad():
            assert torch.allclose(session(x), model(x), atol=1e-4)
    with pytest.raises(ModelError, match="in the runtime"):
        forward_or_raise(session, torch.ones(1, 7, 8, 8), "in the runtime")
    with torch.no_grad():
        assert torch.allclose(session(one), model(one), atol=1e-4)


def test_batch_norms_with_negative_factors_turn_codes_around(tmp_path: Path) -> None:
    model = net("convolutional")
    with torch.no_grad():
        model.blocks[0].norm1.weight[::2] *= -1
    model = stored("convolutional", {"quantize.affine": {"bits": 8}}, model=model)
    _, error = round_trip(model, "convolutional", "openvino", tmp_path / "m.xml")
    assert error < 1e-5


def test_the_rest_can_be_bfloat16(tmp_path: Path) -> None:
    model, x = int8("transformer"), inputs("transformer")
    errors = []
    for rest in ("float32", "bfloat16"):
        made, error = round_trip(model, "transformer", "openvino", tmp_path / f"{rest}.xml", rest=rest)
        assert any(f"computed in {rest}" in note for note in made.notes)
        errors.append(error)
    assert errors[0] < errors[1] < 0.03
    with torch.no_grad():
        assert run(tmp_path / "bfloat16.xml", "openvino", x).dtype == model(x).dtype


def test_nothing_is_reported() -> None:
    code = "from smelt.formats.openvino import package; package(); import sys; print(sys.modules['openvino_telemetry'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"


def test_static_needs_data(tmp_path: Path) -> None:
    from smelt.core.errors import DataError

    with pytest.raises(DataError, match="it needs data to calibrate"):
        export(
            int8("convolutional"), "openvino", tmp_path / "m.xml", example=inputs("convolutional"), activations="static"
        )
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_names_the_module(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum()) if float(x.sum()) > 0 else x

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Odd()).eval()
    with pytest.raises(ModelError, match=r"^1 cannot be written as openvino"):
        export(model, "openvino", tmp_path / "m.xml", example=torch.ones(2, 4), data=[(torch.ones(2, 4), None)])


def test_calibration_batches_are_used(tmp_path: Path) -> None:
    """Ten times larger calibration data gives steps ten times as large, and so a larger error."""
    model, x = int8("convolutional", at_input=False), inputs("convolutional")
    errors = []
    for factor in (1, 10):
        data = [(factor * given, labels) for given, labels in batches("convolutional")]
        export(model, "openvino", tmp_path / "m.xml", example=x, data=data, activations="static", force=True)
        with torch.no_grad():
            errors.append(float((run(tmp_path / "m.xml", "openvino", x) - model(x)).abs().mean()))
    assert errors[1] > 2 * errors[0]


def test_static_keeps_the_grids_that_are_stored(tmp_path: Path) -> None:
    """Data ten times as large moves only what no step stored: the second input of sums."""
    model, x = int8("convolutional"), inputs("convolutional")
    data = [(10 * given, labels) for given, labels in batches("convolutional")]
    export(model, "openvino", tmp_path / "m.xml", example=x, data=data, activations="static")
    with torch.no_grad():
        want = model(x)
    assert float((run(tmp_path / "m.xml", "openvino", x) - want).norm() / want.norm()) < 0.15
