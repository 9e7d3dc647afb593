import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smelt.graph.chains import Link, chains


class Net(nn.Module):
    """Linear layers a, b, c, d of width 4; `run` is the forward pass."""

    def __init__(self, run) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.act = nn.LayerNorm(4), nn.LeakyReLU(inplace=True)
        self.run = run

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.run(self, x, mask)


def pairs(model: nn.Module) -> list[tuple[str, ...]]:
    return [(k.producer, k.consumer, *(step.name for step in k.between)) for k in chains(model)[0]]


def plain(m, x, mask):
    x = F.dropout(m.act(m.a(x)), 0.5, m.training)
    x = m.b(x).relu().contiguous()
    return m.d(m.c(torch.tanh(F.gelu(x if mask is None else x * mask, approximate="tanh"))))


def test_modules_functions_and_methods():
    model = Net(plain)
    assert pairs(model) == [
        ("a", "b", "leakyrelu", "dropout"),
        ("b", "c", "relu", "identity", "gelu", "tanh"),
        ("c", "d"),
    ]
    links, reasons = chains(model)
    assert reasons == {"d": "its output leaves the model"}
    assert [link.homogeneous for link in links] == [True, False, True]
    x = torch.randn(9)
    kept = x.clone()
    torch.testing.assert_close(links[0].apply(x), F.leaky_relu(kept))
    torch.testing.assert_close(links[1].apply(x), F.gelu(x.relu(), approximate="tanh").tanh())
    assert torch.equal(x, kept)


CASES = {
    "a second user": (lambda m, x, _: m.b(y := m.a(x)) + y, "a", "2 users"),
    "a residual after the function": (lambda m, x, _: m.b(y := m.a(x).relu()) + y, "a", "2 users"),
    "a user when an argument is left out": (
        lambda m, x, mask: m.b(y := m.a(x)) + (m.c(y) if mask is None else 0),
        "a",
        "2 users",
    ),
    "a norm": (lambda m, x, _: m.b(m.norm(m.a(x))), "a", "goes through norm, which is not known"),
    "a softmax": (lambda m, x, _: m.b(m.a(x).softmax(-1)), "a", "goes through softmax"),
    "a sum": (lambda m, x, _: m.b(m.a(x) + x), "a", "goes through add"),
    "used twice": (lambda m, x, _: m.b(m.a(m.a(x))), "a", "used 2 times"),
    "a consumer used twice": (lambda m, x, _: m.b(m.b(m.a(x))), "a", "its consumer b: the layer is used 2 times"),
    "weights used outside": (lambda m, x, _: m.b(m.a(x)) @ m.a.weight, "a", "also used outside the layer"),
    "not used": (lambda m, x, _: (m.a(x), m.b(x))[1], "a", "is not used"),
    "never called": (lambda m, x, _: m.b(x), "a", "not found"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_pair(case):
    run, path, words = CASES[case]
    links, reasons = chains(Net(run))
    assert path not in [link.producer for link in links]
    assert words in reasons[path]


def test_tied_and_hooked_layers():
    model = Net(plain)
    model.d.weight = model.a.weight
    assert pairs(model) == [("b", "c", "relu", "identity", "gelu", "tanh")]
    assert "tied" in chains(model)[1]["a"]
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    handle = model[1].register_forward_hook(lambda *_: None)
    assert pairs(model) == []
    handle.remove()
    assert pairs(model) == [("0", "2", "relu")]
    model[2].register_forward_pre_hook(lambda *_: None)
    assert "a hook" in chains(model)[1]["0"]


class Branching(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def test_what_cannot_be_traced_is_looked_at_in_parts():
    inner = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), Branching(nn.Identity()), nn.Linear(4, 4), nn.Tanh(), Net(plain)
    )
    model = nn.ModuleDict({"m": Branching(inner)})
    found = pairs(model)
    assert ("m.inner.0", "m.inner.2", "relu") in found
    assert ("m.inner.6.a", "m.inner.6.b", "leakyrelu", "dropout") in found
    assert len(found) == 4
    reasons = chains(model)[1]
    assert "m.inner.3, which" in reasons["m.inner.2"]
    assert reasons["m.inner.6.d"] == "its output leaves 'm.inner.6'"
    assert set(reasons) | {link.producer for link in chains(model)[0]} == {
        n for n, m in model.named_modules() if type(m) is nn.Linear
    }


def test_per_channel_functions_are_not_elementwise():
    for act, known in ((nn.PReLU(), True), (nn.PReLU(3), False), (nn.Softmax(1), False), (nn.Hardswish(), True)):
        model = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3))
        assert bool(pairs(model)) is known
    link = chains(nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.Linear(3, 3)))[0][0]
    assert isinstance(link, Link) and link.homogeneous


class Maps(nn.Module):
    """Convolutions a, b, c of 4 channels, depthwise d, linear e on maps of 2 x 2; `run` is the forward pass."""

    def __init__(self, run) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.d, self.e = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(16, 3)
        self.two, self.norm, self.pool = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4), nn.AvgPool2d(2, padding=1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def test_channels_go_through_norms_pools_depthwise_convolutions_and_flattening():
    def run(m, x):
        x = m.pool(F.max_pool2d(F.relu(m.norm(m.a(x))), 2))
        x = F.adaptive_avg_pool2d(m.c(m.d(m.b(x)).relu()), 2)
        return m.e(x.view(x.size(0), -1))

    assert pairs(Maps(run)) == [
        ("a", "b", "batchnorm2d", "relu", "maxpool2d", "avgpool2d"),
        ("b", "c", "conv2d", "relu"),
        ("c", "e", "adaptiveavgpool2d", "flatten"),
    ]
    links, reasons = chains(Maps(run))
    assert [[step.zeros for step in link.between] for link in links[:2]] == [[False, False, False, True], [True, False]]
    assert [link.pads for link in links] == [True, True, False]
    assert reasons == {"d": "it is a grouped convolution", "two": "it is a grouped convolution", "e": LEAVES}
    for flat in (
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, start_dim=1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.view(x.size()[0], -1),
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=[-1, -2]),
    ):
        assert pairs(Maps(lambda m, x, flat=flat: m.e(flat(m.a(x)).relu())))[0][:2] == ("a", "e")


LEAVES = "its output leaves the model"
APART = {
    "written sizes": (lambda m, x: m.e(m.a(x).view(-1, 16)), "view"),
    "other sizes asked for": (lambda m, x: m.e(F.relu(y := m.a(x)).view(x.size(0), -1) * y.size(1)), "2 users"),
    "a grouped consumer": (lambda m, x: m.two(m.a(x)), "its consumer two: it is a grouped convolution"),
    "a linear layer on positions": (lambda m, x: m.e(m.a(x)), "its consumer e: does not take the channels as such"),
    "a norm after flattening": (lambda m, x: m.e(m.norm(m.a(x).flatten(1))), "norm"),
    "a norm used twice": (lambda m, x: m.b(m.norm(m.a(m.norm(x)))), "norm"),
    "a padded mean": (lambda m, x: m.b(F.avg_pool2d(m.a(x), 2, padding=1)), "avg_pool2d"),
    "a mean over channels": (lambda m, x: m.b(m.a(x).mean((1, 2))), "mean"),
    "flattened channels only": (lambda m, x: m.e(m.a(x).flatten(1, 2)), "flatten"),
}


@pytest.mark.parametrize("case", APART)
def test_what_mixes_channels(case):
    run, words = APART[case]
    links, reasons = chains(Maps(run))
    assert "a" not in [link.producer for link in links]
    assert words in reasons["a"]
