"""Small networks of the kinds that every format must carry, with inputs for them; all random, from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Depthwise and pointwise convolutions beside a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.norm1(self.depthwise(x)))
        return functional.relu(x + self.norm2(self.pointwise(y)))


class Convolutional(nn.Module):
    """Images [n, 3, 12, 12] -> 10 logits: residual adds, depthwise convolutions, batch norms, pooling, a head."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(functional.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5 + mask).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, length, width))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Tokens [n, length] -> logits [n, length, vocabulary]: a decoder whose mask is -1e9, its embedding tied to the
    head."""

    def __init__(self, width: int = 64, vocabulary: int = 50, depth: int = 2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.attention = nn.ModuleList(Attention(width, 4) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = torch.full((tokens.shape[1],) * 2, -1e9, device=x.device).triu(1)
        for i, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * i](x), mask)
            x = x + self.down[i](functional.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Sequences [n, length, 8] -> 5 logits: an LSTM, then a GRU."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.lstm = nn.LSTM(8, width, batch_first=True)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, _ = self.gru(x)
        return self.head(x[:, -1])  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """(user [n], items [n, 4], features [n, 6]) -> a score [n]: tables of embeddings and a perceptron."""

    def __init__(self, users: int = 300, items: int = 200, width: int = 32):
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.EmbeddingBag(items, width, mode="mean")
        self.layers = nn.Sequential(nn.Linear(2 * width + 6, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, user: Tensor, items: Tensor, features: Tensor) -> Tensor:
        x = torch.cat((self.users(user), self.items(items), features), 1)
        return self.layers(x).squeeze(1)  # type: ignore[no-any-return]


def inputs(kind: str, n: int = 8, seed: int = 1) -> Any:
    """Inputs of a batch of n samples, as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "convolutional":
        return torch.randn(n, 3, 12, 12, generator=generator)
    if kind == "transformer":
        return torch.randint(50, (n, 12), generator=generator)
    if kind == "recurrent":
        return torch.randn(n, 9, 8, generator=generator)
    user = torch.randint(300, (n,), generator=generator)
    return user, torch.randint(200, (n, 4), generator=generator), torch.randn(n, 6, generator=generator)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": Convolutional,
    "transformer": Transformer,
    "recurrent": Recurrent,
    "embedding": Embedding,
}
KINDS = tuple(BUILDERS)


def net(kind: str, seed: int = 0) -> nn.Module:
    """The network of a kind, in evaluation mode, its batch norms with statistics of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = BUILDERS[kind]()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return made.eval()


def batches(kind: str, count: int = 4, n: int = 16) -> list[Any]:
    """Calibration batches (inputs, labels); the labels are of no use."""
    return [(inputs(kind, n, seed=100 + i), torch.zeros(n, dtype=torch.long)) for i in range(count)]
