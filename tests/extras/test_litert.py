"""LiteRT: what is stored arrives in integers, and its kernels compute what the stored model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smelt.core.errors import ModelError
from smelt.core.export import export
from smelt.core.runtime import runtime
from smelt.formats._flatbuffer import File
from tests.extras._stored import BLOCKS, FOUR, int8, net, round_trip, stored
from tests.formats._nets import KINDS, batches, inputs


@pytest.fixture(autouse=True)
def installed() -> None:
    if why := runtime("litert").missing():
        pytest.fail(why)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_dense(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(net(kind), kind, "litert", tmp_path / "m.tflite")
    assert error < 1e-5 and not made.notes


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_integers_with_ranges_at_run_time(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(int8(kind, at_input=False), kind, "litert", tmp_path / "m.tflite")
    dense = export(net(kind), "litert", tmp_path / "dense.tflite", example=inputs(kind))
    assert error < 0.02 and not made.notes
    codes = sum(p.numel() for p in net(kind).parameters())
    assert made.bytes < dense.bytes - 2 * codes


@pytest.mark.parametrize("kind", ["convolutional", "transformer"])
def test_static(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(int8(kind), kind, "litert", tmp_path / "m.tflite", activations="static")
    assert error < 0.03 and not made.notes


def test_integers_only(tmp_path: Path) -> None:
    _, error = round_trip(int8("convolutional"), "convolutional", "litert", tmp_path / "m.tflite", integer=True)
    file = File((tmp_path / "m.tflite").read_bytes())
    kinds = {graph.tensors[i].type for graph, operation, _ in file.operations() for i in file.tensors(operation)}
    assert not file.floating() and kinds <= {file.schema.TensorType.INT8, file.schema.TensorType.INT32}
    assert error < 0.03
    with pytest.raises(ModelError, match="would run in floating point"):
        export(
            net("convolutional"),
            "litert",
            tmp_path / "f.tflite",
            example=inputs("convolutional"),
            data=batches("convolutional"),
            integer=True,
        )
    assert not (tmp_path / "f.tflite").exists()


def test_blocks_of_four_bits(tmp_path: Path) -> None:
    made, error = round_trip(stored("transformer", BLOCKS), "transformer", "litert", tmp_path / "m.tflite")
    eight = export(int8("transformer", at_input=False), "litert", tmp_path / "8.tflite", example=inputs("transformer"))
    assert error < 0.02 and made.bytes < eight.bytes


def test_groups_with_zeros_are_taken_back_to_values_exactly(tmp_path: Path) -> None:
    made, error = round_trip(stored("embedding", FOUR), "embedding", "litert", tmp_path / "m.tflite")
    dense = export(net("embedding"), "litert", tmp_path / "dense.tflite", example=inputs("embedding"))
    assert error < 1e-5 and made.bytes < 0.6 * dense.bytes


def test_values_are_rounded_to_the_ends(tmp_path: Path) -> None:
    """A file of integers gives multiples of its output scale."""
    from smelt.core.runtime import open_session

    model = int8("convolutional")
    export(model, "litert", tmp_path / "m.tflite", data=batches("convolutional"), integer=True)
    session = open_session("litert", tmp_path / "m.tflite")
    found = session(batches("convolutional")[0][0])
    assert isinstance(found, torch.Tensor)
    scale, _ = session.outputs[0]["quantization"]
    assert torch.allclose(found / scale, (found / scale).round(), atol=1e-3)
