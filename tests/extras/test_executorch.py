"""ExecuTorch: what is stored arrives in integers, and XNNPACK's kernels compute what the stored model does."""

from __future__ import annotations

from pathlib import Path

import pytest

from smelt.core.export import export
from smelt.core.runtime import runtime
from tests.extras._stored import BLOCKS, int8, net, round_trip, stored
from tests.formats._nets import KINDS, inputs


@pytest.fixture(autouse=True)
def installed() -> None:
    if why := runtime("executorch").missing():
        pytest.fail(why)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_dense(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(net(kind), kind, "executorch", tmp_path / "m.pte")
    assert error < 1e-5 and not made.notes


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_integers_with_ranges_of_each_batch(kind: str, tmp_path: Path) -> None:
    model = int8(kind, at_input=False)
    made, error = round_trip(model, kind, "executorch", tmp_path / "m.pte")
    assert error < 0.02
    dense = export(net(kind), "executorch", tmp_path / "dense.pte", example=inputs(kind))
    assert made.bytes < 0.5 * dense.bytes or kind in ("convolutional", "recurrent")  # named in a note
    assert bool(made.notes) == (kind in ("convolutional", "recurrent"))


def test_static_takes_the_grids_that_are_stored(tmp_path: Path) -> None:
    model = int8("convolutional")
    made, error = round_trip(model, "convolutional", "executorch", tmp_path / "m.pte", activations="static")
    assert error < 0.03 and not made.notes


def test_grids_at_inputs_alone_do_not_suffice(tmp_path: Path) -> None:
    made, error = round_trip(int8("convolutional"), "convolutional", "executorch", tmp_path / "m.pte")
    assert "activations=static" in made.notes[0] and error < 0.02


def test_blocks_of_four_bits(tmp_path: Path) -> None:
    model = stored("transformer", BLOCKS)
    made, error = round_trip(model, "transformer", "executorch", tmp_path / "m.pte")
    eight = export(int8("transformer", at_input=False), "executorch", tmp_path / "8.pte", example=inputs("transformer"))
    assert error < 0.02 and made.bytes < eight.bytes
