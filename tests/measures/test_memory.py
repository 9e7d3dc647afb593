import torch
from torch import nn

from smelt.measures.memory import memory


def chain(inplace: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(inplace), nn.Linear(8, 2, bias=False))


def test_a_chain_by_hand():
    weights, x, hidden, out = (32 + 16) * 4, 12 * 4, 24 * 4, 6 * 4
    assert memory(chain(False), torch.randn(3, 4)) == weights + x + hidden + hidden
    assert memory(chain(True), torch.randn(3, 4)) == weights + x + hidden + out


def test_it_repeats_and_leaves_the_modes():
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout()), torch.randn(2, 1, 8, 8)
    first = memory(model, x)
    assert all(memory(model, x) == first for _ in range(3))
    assert all(m.training for m in model.modules()) and int(model[1].num_batches_tracked) == 0


def test_views_and_tied_tensors_count_once():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(10, 10))
            self.b = self.a

        def forward(self, x):
            return x.view(-1).unsqueeze(0).t()[::2]

    assert memory(Views(), torch.zeros(6, 6)) == 400 + 144


def test_what_is_kept_stays_and_what_is_dropped_goes():
    class Keep(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.keep = keep

        def forward(self, x):
            kept = []
            for _ in range(5):
                x = x + 1
                if self.keep:
                    kept.append(x)
            return x

    x = torch.zeros(25)
    assert memory(Keep(True), x) == 600
    assert memory(Keep(False), x) == 300


def test_inputs_and_outputs_of_an_operator_live_together():
    class Join(nn.Module):
        def forward(self, a, b):
            return torch.cat([a, b])

    assert memory(Join(), {"a": torch.zeros(10), "b": torch.zeros(5)}) == 2 * 60


def test_attention_scores_are_seen():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(1, 64, 4)
    assert memory(layer, (x, x, x)) > 2 * 64 * 64 * 4
