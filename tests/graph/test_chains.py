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
