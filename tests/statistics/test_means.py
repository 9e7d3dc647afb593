import pytest
import torch
from torch import nn

from smelt.core.errors import DataError
from smelt.statistics._counts import shares
from smelt.statistics._roots import Root, Truncated
from smelt.statistics.means import Means


def test_means_of_a_linear_layer_before_and_now() -> None:
    found, x, before = Means(nn.Linear(4, 2)), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    found.update(x[:1], before[:1])
    found.update(x[1:], before[1:])
    wanted = torch.stack([before.mean((0, 1)), x.mean((0, 1))])[:, None].double()
    torch.testing.assert_close(found.result(), wanted, atol=1e-6, rtol=1e-5)


def test_means_of_the_patches_of_a_convolution() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), torch.randn(3, 4, 7, 7)
    found = Means(layer)
    found.update(x)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2).mean((0, 2)).reshape(2, -1)
    torch.testing.assert_close(found.result(), torch.stack([patches, patches]).double(), atol=1e-6, rtol=1e-5)
    with pytest.raises(DataError, match="NaN"):
        found.update(torch.full((1, 4, 7, 7), torch.nan))


def test_shares_of_look_ups() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    found = shares(model, ["0"], [torch.tensor([[1, 1], [4, 0]]), torch.tensor([[1, 1]])], 16)
    assert found["0"].tolist() == pytest.approx([1 / 6, 4 / 6, 0, 0, 1 / 6])
    with pytest.raises(DataError, match="no calibration batch reaches '0'"):
        shares(model, ["0"], [], 16)


def test_roots() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(50, 4).double() @ torch.randn(4, 6).double(), torch.randn(3, 6).double()
    whole = torch.randn(50, 6).double()
    for moments in (whole.T @ whole, (whole.T @ whole).diagonal()):
        root = Root(moments)
        torch.testing.assert_close(root.undo(root.apply(w)), w)
        full = moments if moments.dim() == 2 else moments.diag()
        torch.testing.assert_close(root.apply(w) @ root.apply(w).T, w @ full @ w.T)
        torch.testing.assert_close(root.lengths(), full.diagonal().sqrt())
    poor = Root(x.T @ x)  # of rank 4
    torch.testing.assert_close(poor.apply(w) @ poor.apply(w).T, w @ x.T @ x @ w.T)
    torch.testing.assert_close(x @ poor.undo(poor.apply(w)).T, x @ w.T)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_truncated(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape).double()
    found = Truncated(w)
    torch.testing.assert_close(found.squares, torch.linalg.svdvals(w).square())
    left, right = found.factors(3)
    torch.testing.assert_close(found.error(w - left @ right), float(found.squares[3:].sum()))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
