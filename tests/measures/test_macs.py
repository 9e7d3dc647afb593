import pytest
import torch
from torch import nn

from smelt.measures.macs import macs
from smelt.models import lenet


@pytest.mark.parametrize("n", [1, 3])
def test_lenet_by_hand(n):
    model = lenet.build()
    by_hand = 20 * 25 * 24 * 24 + 50 * 20 * 25 * 8 * 8 + 800 * 500 + 500 * 10
    assert by_hand == 2_293_000
    assert macs(model, torch.randn(n, 1, 28, 28)) == by_hand


def attention(length: int, width: int) -> int:
    return length * width * 3 * width + length * width * width + 2 * length * length * width


def test_attention_by_hand_and_settings_restored():
    x = torch.randn(2, 5, 16)
    fast = torch.backends.mha.get_fastpath_enabled()
    assert macs(nn.MultiheadAttention(16, 4, batch_first=True), (x, x, x)) == attention(5, 16)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    assert macs(layer, x) == attention(5, 16) + 2 * 5 * 16 * 32
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled
    assert layer.training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("model", "shape", "by_hand"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5), 8 * 9 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 6 * 4 * 9 * 16),
        (nn.ConvTranspose2d(8, 4, 3), (2, 8, 5, 5), 8 * 4 * 9 * 25),
        (nn.Conv1d(3, 4, 5), (2, 3, 9), 4 * 3 * 5 * 5),
        (nn.Linear(6, 7), (2, 3, 6), 3 * 6 * 7),
        (nn.LSTM(8, 6, batch_first=True), (2, 5, 8), 5 * (8 + 6) * 24),
        (nn.GRU(8, 6, batch_first=True), (2, 5, 8), 5 * (8 + 6) * 18),
        (nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), (2, 6), 0),
    ],
)
def test_layers_by_hand(model, shape, by_hand):
    assert macs(model, torch.randn(shape)) == by_hand


def test_products_of_vectors_and_bilinear_layers():
    class Products(nn.Module):
        def forward(self, m, v):
            return m @ v + v @ v

    assert macs(Products(), {"m": torch.randn(1, 3), "v": torch.randn(3)}) == 6
    assert macs(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))) == 60


class Token(nn.Module):
    """A view of a parameter is handed to a submodule, as class tokens are."""

    def __init__(self):
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 7)

    def forward(self, x):
        return x + self.layer(self.token.expand(len(x), -1, -1))


def test_views_of_parameters_and_what_asks_for_gradients_is_restored():
    model = Token()
    model.layer.bias.requires_grad_(False)
    assert macs(model, torch.randn(1, 2, 7)) == 6 * 7
    assert model.token.requires_grad and not model.layer.bias.requires_grad
