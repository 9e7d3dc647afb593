"""Small networks, one for each way in which coordinates hang together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Run(nn.Module):
    """Modules by name, a forward function, and numbers that it reads."""

    def __init__(self, run, numbers=None, **parts) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.add_module(name, part)
        for name, value in (numbers or {}).items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv_chain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)),
    )


def residual() -> nn.Module:
    def run(m, x):
        x = m.stem(x)
        x = x + m.b(F.relu(m.a(x)))
        return m.head(x.mean((2, 3)))

    conv = nn.Conv2d
    return Run(run, stem=conv(3, 8, 3), a=conv(8, 12, 3, padding=1), b=conv(12, 8, 1), head=nn.Linear(8, 4))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 6, 1))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 3, 1))


def dense() -> nn.Module:
    def run(m, x):
        x = m.a(x)
        x = torch.cat([x, torch.relu(m.b(x))], 1)
        return m.c(m.bn(x))

    conv = nn.Conv2d
    return Run(run, a=conv(3, 6, 1), b=conv(6, 4, 3, padding=1), bn=nn.BatchNorm2d(10), c=conv(10, 2, 1))


def gate() -> nn.Module:
    def run(m, x):
        a, b = m.up(x).chunk(2, -1)
        return m.down(F.silu(a) * b)

    return Run(run, up=nn.Linear(5, 16), down=nn.Linear(8, 3))


def halves() -> nn.Module:
    """Two halves with different readers: they must stay equally long."""

    def run(m, x):
        a, b = m.up(x).chunk(2, -1)
        return m.left(a) + m.right(torch.relu(b))

    return Run(run, up=nn.Linear(5, 16), left=nn.Linear(8, 3), right=nn.Linear(8, 3))


def pieces() -> nn.Module:
    """Pieces whose sizes are attributes."""

    def run(m, x):
        a, b = m.up(x).split(m.sizes, dim=-1)
        y = m.left(a) + m.right(torch.relu(b))
        return y + m.last(m.up(x)[:, m.sizes[0] :])

    return Run(
        run, {"sizes": [10, 6]}, up=nn.Linear(5, 16), left=nn.Linear(10, 3), right=nn.Linear(6, 3), last=nn.Linear(6, 3)
    )


def shuffle() -> nn.Module:
    def run(m, x):
        x = torch.cat([m.a(x), m.b(x)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.c(x)

    conv = nn.Conv2d
    return Run(run, a=conv(3, 6, 1), b=conv(3, 6, 1), c=conv(12, 2, 1))


def squeeze() -> nn.Module:
    def run(m, x):
        x = m.a(x)
        s = torch.sigmoid(m.expand(F.relu(m.reduce(x.mean((2, 3), keepdim=True)))))
        return m.b(x * s)

    conv = nn.Conv2d
    return Run(run, a=conv(3, 8, 3), reduce=conv(8, 4, 1), expand=conv(4, 8, 1), b=conv(8, 2, 1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3))


class Rotary(nn.Module):
    """Grouped-query attention with rotary positions, as decoders write it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = 8, 4, 6
        self.q, self.k, self.v = nn.Linear(10, 48), nn.Linear(10, 24), nn.Linear(10, 24)
        self.o = nn.Linear(48, 10)
        self.register_buffer("frequencies", 0.1 ** torch.arange(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        angles = torch.arange(n)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        q, k = (y * angles.cos() + turned(y) * angles.sin() for y in (q, k))
        k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, -1, n, y.shape[-1]) for y in (k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.4, -1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, n, -1))


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def recurrent() -> nn.Module:
    def run(m, x):
        return m.head(m.rnn(m.embed(x))[0])

    return Run(run, embed=nn.Linear(5, 6), rnn=nn.LSTM(6, 8, 2, batch_first=True), head=nn.Linear(8, 3))


def tied() -> nn.Module:
    def run(m, x):
        y = m.embed(x)
        y = y + m.down(F.gelu(m.up(y)))
        return y @ m.embed.weight.T

    return Run(run, embed=nn.Embedding(9, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.RMSNorm(6), nn.Linear(6, 2))


def group_normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 2, 1))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.ConvTranspose2d(6, 6, 2, groups=6),
        nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def padded() -> nn.Module:
    """A shortcut that is filled with zero channels."""

    def run(m, x):
        x = m.stem(x)
        y = m.b(F.relu(m.a(x)))
        return m.head(F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + y).mean((2, 3)))

    conv = nn.Conv2d
    return Run(run, stem=conv(3, 4, 1), a=conv(4, 6, 3, 2, 1), b=conv(6, 8, 3, 1, 1), head=nn.Linear(8, 3))


def einsum() -> nn.Module:
    def run(m, x):
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in (m.q, m.k, m.v))
        weights = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k), -1)
        return torch.einsum("bhnd,hdc->bnc", torch.einsum("bhnm,bhmd->bhnd", weights, v), m.o)

    made = {name: nn.Parameter(torch.randn(4, 10, 6) / 4) for name in "qkv"}
    return Run(run, **made, o=nn.Parameter(torch.randn(4, 6, 10) / 4))


def windows() -> nn.Module:
    """Attention in shifted windows of 2 x 2 with a table of relative positions."""

    def run(m, x):
        x = m.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(x, (-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = m.qkv(y).reshape(len(y), 4, 3, m.heads, -1).permute(2, 0, 3, 1, 4)
        place = torch.arange(4)
        bias = m.table[(place[:, None] - place + 3).view(-1)].view(4, 4, -1).permute(2, 0, 1)
        y = torch.softmax(q @ k.transpose(-2, -1) + bias, -1) @ v
        y = m.proj(y.transpose(1, 2).flatten(2))
        y = y.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c)
        return m.head((x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))

    linear = nn.Linear
    return Run(
        run, {"heads": 4}, stem=nn.Conv2d(3, 8, 1), qkv=linear(8, 48), proj=linear(16, 8), head=linear(8, 3),
        table=nn.Parameter(torch.randn(7, 4)),
    )  # fmt: skip


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1), nn.PixelUnshuffle(2))


def width_bound() -> nn.Module:
    """The code divides the width of its input by the number of heads, so that heads x head dims must be the width."""

    def run(m, x):
        x = m.stem(x)
        b, n, c = x.shape
        q, k, v = m.qkv(x).reshape(b, n, 3, m.heads, c // m.heads).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        return m.head(x + m.proj(y.transpose(1, 2).reshape(b, n, c)))

    linear = nn.Linear
    return Run(run, {"heads": 4}, stem=linear(5, 16), qkv=linear(16, 48), proj=linear(16, 16), head=linear(16, 3))


def cross() -> nn.Module:
    """nn.MultiheadAttention over keys and values of other widths."""

    def run(m, x):
        return m.head(m.attention(m.query(x), m.key(x), m.value(x))[0])

    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    linear = nn.Linear
    return Run(run, attention=attention, query=linear(5, 8), key=linear(5, 6), value=linear(5, 4), head=linear(8, 3))


def mixture() -> nn.Module:
    """Two experts, of which each sample meets one."""

    def run(m, x):
        x = m.stem(x)
        best = m.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i in range(2):
            (rows,) = torch.where(best == i)
            out.index_add_(0, rows, F.relu(x[rows] @ m.up[i]) @ m.down[i])
        return m.head(out)

    up, down = nn.Parameter(torch.randn(2, 6, 10)), nn.Parameter(torch.randn(2, 10, 6))
    return Run(run, stem=nn.Linear(5, 6), router=nn.Linear(6, 2), up=up, down=down, head=nn.Linear(6, 3))


IMAGE, TOKENS, ROWS = (2, 3, 8, 8), (2, 7, 5), (6, 5)
# builder, shape of the input (None: token ids), {group: units}
CASES = {
    "conv chain": (conv_chain, IMAGE, {"0.weight": 8, "3.weight": 6}),
    "residual": (residual, IMAGE, {"stem.weight": 8, "a.weight": 12}),
    "depthwise": (depthwise, IMAGE, {"0.weight": 8}),
    "grouped": (grouped, IMAGE, {"0.weight": 4, "0.weight (group channels)": 3, "2.weight": 2}),
    "dense": (dense, IMAGE, {"a.weight": 6, "b.weight": 4}),
    "gate": (gate, ROWS, {"up.weight": 8}),
    "halves": (halves, ROWS, {"up.weight": 16}),
    "pieces": (pieces, ROWS, {"up.weight": 10, "up.weight (channels)": 6}),
    "shuffle": (shuffle, IMAGE, {"a.weight": 6}),
    "squeeze": (squeeze, IMAGE, {"a.weight": 8, "reduce.weight": 4}),
    "encoder": (encoder, TOKENS, {"0.weight": 4, "0.weight (head dims)": 4, "1.linear1.weight": 24}),
    "rotary": (Rotary, (2, 7, 10), {"q.weight": 4, "q.weight (head dims)": 3}),
    "recurrent": (recurrent, TOKENS, {"embed.weight": 6, "rnn.weight_ih_l0": 8}),
    "tied": (tied, None, {"embed.weight": 8, "up.weight": 12}),
    "normed": (normed, ROWS, {"0.weight": 8, "2.weight": 6}),
    "group normed": (group_normed, IMAGE, {"0.weight": 12}),
    "transposed": (transposed, IMAGE, {"0.weight": 8, "1.weight": 6}),
    "padded": (padded, IMAGE, {"stem.weight": 4, "a.weight": 6}),
    "einsum": (einsum, (2, 7, 10), {"q": 4, "q (channels)": 6, "v": 6}),
    "windows": (windows, IMAGE, {"stem.weight": 8, "qkv.weight": 4, "qkv.weight (head dims)": 4}),
    "pixels": (pixels, IMAGE, {"0.weight": 4}),
    "width bound": (width_bound, TOKENS, {"stem.weight": 4, "stem.weight (head dims)": 4}),
    "cross": (
        cross,
        TOKENS,
        {
            **{"attention.q_proj_weight": 2, "attention.q_proj_weight (head dims)": 4},
            **{"attention.out_proj.weight": 8, "key.weight": 6, "value.weight": 4},
        },
    ),
    "mixture": (mixture, ROWS, {"up": 10, "down": 6}),
}


def case(name: str) -> tuple[nn.Module, Tensor, dict]:
    build, shape, expected = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.dtype == torch.float32)):
            if tensor.dim() == 1 and not isinstance(model, Rotary):
                tensor.add_(torch.rand_like(tensor) / 2)
    x = torch.randint(9, (2, 6)) if shape is None else torch.randn(shape)
    return model, x, expected
