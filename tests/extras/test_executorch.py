"""ExecuTorch: what is stored arrives in integers, and XNNPACK's kernels compute what the stored model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from smelt.core.apply import apply_step
from smelt.core.export import export
from smelt.core.method import Known
from smelt.core.recipe import Recipe
from smelt.core.runtime import runtime
from tests.extras._stored import BLOCKS, int8, left, net, round_trip, run, stored
from tests.formats._nets import KINDS, inputs


@pytest.fixture(autouse=True)
def installed() -> None:
    if why := runtime("executorch").missing():
        pytest.fail(why)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_dense(kind: str, tmp_path: Path) -> None:
    made, error = round_trip(net(kind), kind, "executorch", tmp_path / "m.pte")
    assert error < 1e-5 and not left(made)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_integers_with_ranges_of_each_batch(kind: str, tmp_path: Path) -> None:
    model = int8(kind, at_input=False)
    made, error = round_trip(model, kind, "executorch", tmp_path / "m.pte")
    assert error < 0.02
    dense = export(net(kind), "executorch", tmp_path / "dense.pte", example=inputs(kind))
    assert made.bytes < 0.5 * dense.bytes or kind in ("convolutional", "recurrent")  # named in a note
    assert bool(left(made)) == (kind in ("convolutional", "recurrent"))


def test_static_takes_the_grids_that_are_stored(tmp_path: Path) -> None:
    model = int8("convolutional")
    made, error = round_trip(model, "convolutional", "executorch", tmp_path / "m.pte", activations="static")
    assert error < 0.03 and not left(made)


class Inverted(nn.Module):
    """Images [n, 3, 12, 12] -> 10 logits: three convolutions beside a shortcut, as in MobileNetV2, twice."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 4 * width, 1),
                nn.ReLU6(),
                nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width),
                nn.ReLU6(),
                nn.Conv2d(4 * width, width, 1),
            )
            for _ in range(2)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_shortcuts_around_several_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = "convolutional"
    model = stored(kind, {"quantize.affine": {"bits": 8}}, model=Inverted().eval())
    made, error = round_trip(model, kind, "executorch", tmp_path / "m.pte", activations="static")
    assert error < 0.03 and not left(made)


class Heads(nn.Module):
    """Sequences [n, 9, 32] -> the same, of attention in four heads."""

    def __init__(self, causal: bool):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(32, 96), nn.Linear(32, 32), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_runs_in_xnnpack_as_a_whole(causal: bool, tmp_path: Path) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    torch.manual_seed(0)
    model, x = Heads(causal).eval(), torch.randn(2, 9, 32)
    export(model, "executorch", tmp_path / "m.pte", example=x)
    with torch.no_grad():
        assert torch.allclose(run(tmp_path / "m.pte", "executorch", x), model(x), atol=1e-5)
    plan = deserialize_pte_binary((tmp_path / "m.pte").read_bytes()).program.execution_plan[0]
    assert not plan.operators and len(plan.delegates) == 1


class OneHead(nn.Module):
    """Sequences [n, 9, 32] -> the same; what enters products comes from layers at once."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)  # type: ignore[no-any-return]


def test_products_of_rounded_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 9, 32), OneHead().eval()
    apply_step(model, Recipe.of([{"quantize.affine": {"bits": 8}}]).steps[0], "1", Known([(x, None)]), ())
    export(model, "executorch", tmp_path / "m.pte", example=x, data=[(x, None)], activations="static")
    with torch.no_grad():
        want = model(x)
    assert (run(tmp_path / "m.pte", "executorch", x) - want).norm() < 0.03 * want.norm()


def test_grids_at_inputs_alone_do_not_suffice(tmp_path: Path) -> None:
    made, error = round_trip(int8("convolutional"), "convolutional", "executorch", tmp_path / "m.pte")
    assert "activations=static" in made.notes[0] and error < 0.02


def test_blocks_of_four_bits(tmp_path: Path) -> None:
    model = stored("transformer", BLOCKS)
    made, error = round_trip(model, "transformer", "executorch", tmp_path / "m.pte")
    eight = export(int8("transformer", at_input=False), "executorch", tmp_path / "8.pte", example=inputs("transformer"))
    assert error < 0.02 and made.bytes < eight.bytes
