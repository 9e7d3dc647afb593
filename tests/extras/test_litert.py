"""LiteRT: what is stored arrives in integers, and its kernels compute what the stored model does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from smelt.core.errors import ModelError
from smelt.core.export import export
from smelt.core.runtime import runtime
from smelt.formats._flatbuffer import File
from tests.extras._stored import BLOCKS, FOUR, int8, left, net, round_trip, stored
from tests.formats._nets import KINDS, batches, inputs


@pytest.fixture(autouse=True)
def installed() -> None:
    if why := runtime("litert").missing():
        pytest.fail(why)


def constants(path: Path) -> Counter[str]:
    """Bytes of a file's constants by their type."""
    file = File(path.read_bytes())
    names = {value: name for name, value in vars(file.schema.TensorType).items() if isinstance(value, int)}
    found: Counter[str] = Counter()
    for graph in file.model.subgraphs:
        for at, kind in {tensor.buffer: names[tensor.type] for tensor in graph.tensors}.items():
            data = file.model.buffers[at].data
            found[kind] += 0 if data is None else len(data)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_dense(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(net(kind), kind, "litert", tmp_path / "m.tflite")
    assert error < 1e-5 and not left(made)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_integers_with_ranges_at_run_time(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(int8(kind, at_input=False), kind, "litert", tmp_path / "m.tflite")
    assert error < 0.02 and not left(made)
    model, found = net(kind), constants(tmp_path / "m.tflite")
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert found["INT8"] == weights  # once, and nowhere else
    assert found["FLOAT32"] < weights


@pytest.mark.parametrize("kind", ["convolutional", "transformer"])
def test_static(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(int8(kind), kind, "litert", tmp_path / "m.tflite", activations="static")
    assert error < 0.03 and not left(made)
    (graph,) = (file := File((tmp_path / "m.tflite").read_bytes())).model.subgraphs
    ends = {graph.tensors[i].type for i in (*graph.inputs, *graph.outputs)}
    assert file.schema.TensorType.INT8 not in ends  # it takes and gives values all the same


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


def test_groups_of_convolutions_and_rows_that_they_do_not_fill(tmp_path: Path) -> None:
    """Codes lie in a file as [groups, 24] and the values that they stand for in another order."""
    groups = {"bits": 4, "per": "group", "group": 24, "symmetric": False, "zero": "whole"}
    model = stored("convolutional", {"quantize.affine": groups})
    _, error = round_trip(model, "convolutional", "litert", tmp_path / "m.tflite")
    found = constants(tmp_path / "m.tflite")
    assert error < 1e-5 and found["INT8"] > 1000 and found["FLOAT32"] < 1000


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
