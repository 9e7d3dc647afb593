"""A module of given tensors, as a builder on the shelf `models/` and outside of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BUILT: list[str] = []


class Holder(nn.Module):
    def __init__(self, tensors: dict[str, Tensor], buffers: dict[str, Tensor] | None = None):
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor, persistent=False)


class Net(nn.Module):
    """A tied pair, batch norm, a buffer that is not kept, a tensor that is a plain attribute, an LSTM."""

    def __init__(self, width: int, table: int):
        super().__init__()
        self.fc1 = nn.Linear(6, width)
        self.bn1 = nn.BatchNorm1d(width)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.fc3 = nn.Linear(width, width, bias=False)
        self.fc3.weight = self.fc2.weight
        self.register_buffer("table", torch.arange(float(table)) % 7, persistent=False)
        self.plain = [torch.full((1,), 0.5)]
        self.rnn = nn.LSTM(width, 3, batch_first=True)
        self.act: nn.Module = nn.ReLU()
        self.fc4 = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc3(self.fc2(torch.relu(self.bn1(self.fc1(x))))) + self.table[3] + self.plain[0]
        return self.fc4(self.act(self.rnn(x[:, None])[0][:, 0]))


def build(width: int = 8, table: int = 10, shape: Sequence[int] = ()) -> nn.Module:
    BUILT.append("built")
    return Net(width, table) if not shape else Holder({"w": torch.zeros(*shape)})


def number() -> Any:
    return 3
