from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import smelt
from smelt.core.edit import Note
from smelt.core.errors import DataError
from smelt.core.method import Known, make
from smelt.core.store import apply_edits
from smelt.core.target import targets
from smelt.models.skip import Skip


def swapped(model: nn.Module, x: Any, name: str, on: str = "", **settings: Any) -> list[str]:
    """Applies the method; returns its notes."""
    chosen = [t for t in targets(model) if t.is_weight and on in t.name]
    edits = make(name, settings).plan(model, chosen, Known(batches=[(x, None)]))
    apply_edits(model, edits, name)
    return [f"{e.tensor}: {e.reason}" for e in edits if isinstance(e, Note)]


def lively(model: nn.Module) -> nn.Module:
    """With statistics, gains and biases that matter."""
    generator = torch.Generator().manual_seed(1)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dim() == 1:
            value.data.uniform_(0.4, 1.6, generator=generator)
            if "bias" in name or "mean" in name:
                value.data.sub_(1)
    return model.eval()


class Residual(nn.Module):
    """Convolutions with batch norm around an addition, and one norm behind it that nothing can take in."""

    def __init__(self, pads: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.back, self.bn3 = nn.ConvTranspose2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.bn4 = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 6, 1 + 2 * pads, padding=pads, bias=False)
        self.head, self.bn5 = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.first(x)))
        y = self.bn3(self.back(functional.relu(self.bn2(self.deep(x)))))
        x = functional.relu(self.wide(self.bn4(x + y)))
        return self.bn5(self.head(x.mean((2, 3))))


IMAGES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def test_batch_norms_are_folded_saved_and_loaded(tmp_path: Path) -> None:
    model = lively(Residual())
    before, wide = model(IMAGES), model.wide.weight.clone()
    data = smelt.Data(train=[(IMAGES, torch.zeros(4, dtype=torch.int64))])
    result = smelt.compress(model, ["swap.fold_norm"], smelt.Job(data=data, latency=False))
    torch.testing.assert_close(result.model(IMAGES), before, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in result.model.modules())
    assert all(isinstance(getattr(result.model, f"bn{i}"), Skip) for i in range(1, 6))
    assert result.model.first.bias is not None and result.model.back.bias is not None
    # Behind an addition the norm moves into the layer that reads it.
    a = model.bn4.weight / (model.bn4.running_var + model.bn4.eps).sqrt()
    torch.testing.assert_close(result.model.wide.weight, wide * a[:, None, None])
    result.save(tmp_path / "a.smelt")
    loaded = smelt.load(tmp_path / "a.smelt", into=Residual().eval())
    assert torch.equal(loaded(IMAGES), result.model(IMAGES))


def test_a_norm_before_a_convolution_that_pads_stays_and_is_named() -> None:
    model = lively(Residual(pads=1))
    before = model(IMAGES)
    notes = swapped(model, IMAGES, "swap.fold_norm")
    torch.testing.assert_close(model(IMAGES), before, atol=1e-5, rtol=1e-5)
    assert isinstance(model.bn4, nn.BatchNorm2d) and isinstance(model.bn3, Skip)
    assert len(notes) == 1 and notes[0].startswith("bn4.weight: ") and "zeros at borders" in notes[0]


def test_only_what_is_selected_and_no_data() -> None:
    model = lively(Residual())
    swapped(model, IMAGES, "swap.fold_norm", on="head")
    assert [i for i in range(1, 6) if isinstance(getattr(model, f"bn{i}"), Skip)] == [5]
    with pytest.raises(DataError, match="needs data"):
        make("swap.fold_norm").plan(model, targets(model), Known())


def test_a_shared_norm_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(functional.gelu(self.norm(self.a(x)))))

    torch.manual_seed(0)
    model, x = lively(Twice()), torch.randn(5, 4)
    before = model(x)
    notes = swapped(model, x, "swap.fold_norm")
    torch.testing.assert_close(model(x), before)
    assert isinstance(model.norm, nn.BatchNorm1d) and notes and notes[0].startswith("norm.weight: ")


def test_folding_acts_at_the_start_of_training() -> None:
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()))
    before = model(IMAGES)
    batches = [(IMAGES, torch.zeros(4, dtype=torch.int64))]
    steps = ["swap.fold_norm", {"quantize.affine": {"bits": 8}}]
    with smelt.training(model, steps, steps=2, calibration=batches) as t:
        optimizer = torch.optim.SGD(t.parameters(), 1e-6)
        assert isinstance(model[1], Skip) and any(p is model[0].bias for p in t.parameters())
        for _ in range(2):
            model(IMAGES).pow(2).mean().backward()
            optimizer.step()
            t.step()
    with torch.no_grad():
        assert float((model.eval()(IMAGES) - before).abs().max() / before.abs().max()) < 0.02


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gains_move_into_all_layers_that_read_them(offset: float) -> None:
    class Norm(nn.Module):
        """RMS norm of its own, whose weight is the gain, or the gain less 1."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.weight + offset)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.after = Norm(), nn.LayerNorm(5)
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.c(self.after(torch.sigmoid(self.a(x)) * self.b(x)))

    torch.manual_seed(0)
    model, x = lively(Two()), torch.randn(7, 6)
    before, gain, weight = model(x), model.norm.weight + offset, model.b.weight.clone()
    assert not swapped(model, x, "swap.fold_norm", of="gain")
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model.norm.weight, torch.full((6,), 1 - offset))
    torch.testing.assert_close(model.b.weight, weight * gain)
    assert torch.equal(model.after.bias, torch.zeros(5)) and model.c.bias is not None
