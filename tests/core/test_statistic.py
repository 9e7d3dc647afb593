"""Gradients of weights, in one pass with the rest; and a model walked through part by part."""

import copy
from collections import UserList
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core import walk as walking
from smelt.core.apply import weight_statistics
from smelt.core.errors import DataError
from smelt.core.method import Known
from smelt.core.statistic import gather, of_weights
from smelt.core.target import Target, targets
from smelt.core.walk import blocks, walk


def named(model: nn.Module, *names: str) -> list[Target]:
    return [t for t in targets(model) if t.name in names]


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 4, generator=generator), torch.randint(0, 3, (5,), generator=generator)) for _ in range(n)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3))


def test_gradients_are_those_of_autograd() -> None:
    model, data = net().train(), batches()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = kept = torch.ones(3, 6)
    members = named(model, "0.bias", "3.weight")
    found = of_weights(model, members, ["gradient", "fisher"], data, functional.cross_entropy)
    plain = copy.deepcopy(model).eval().requires_grad_(True)
    for name in ("0.bias", "3.weight"):
        p = dict(plain.named_parameters())[name]
        whole = [torch.autograd.grad(functional.cross_entropy(plain(x), y), p)[0] for x, y in data]
        torch.testing.assert_close(found[name]["gradient"], torch.stack(whole).mean(0))
        one = [
            torch.autograd.grad(functional.cross_entropy(plain(a[None]), b[None]), p)[0]
            for x, y in data
            for a, b in zip(x, y, strict=True)
        ]
        torch.testing.assert_close(found[name]["fisher"], torch.stack(one).square().mean(0))
    assert model.training and not model[0].bias.requires_grad and model[0].weight.requires_grad
    assert model[3].weight.grad is kept and bool((kept == 1).all()) and model[0].bias.grad is None


def test_one_pass_serves_values_and_gradients() -> None:
    model, calls = net(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = of_weights(
        model, named(model, "3.weight"), ["gradient", "second_moment"], batches(), functional.cross_entropy
    )
    assert len(calls) == 3 and set(found["3.weight"]) == {"gradient", "second_moment"}
    inner = torch.cat([model[:3].eval()(x) for x, _ in batches()])
    torch.testing.assert_close(
        found["3.weight"]["second_moment"], inner.detach().double().square().mean(0), rtol=1e-5, atol=0
    )


def test_tied_weights_have_one_gradient_of_all_their_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model, x = Tied(), torch.arange(7)
    found = of_weights(model, targets(model), ["gradient"], [(x, x)], functional.cross_entropy)
    expected = torch.autograd.grad(functional.cross_entropy(model(x), x), model.embed.weight)[0]
    torch.testing.assert_close(found["embed.weight"]["gradient"], expected)


def test_labels_that_lack_are_drawn_from_the_outputs() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    x = torch.tensor([[1.0, 0.0]]).repeat(4000, 1)
    found = [
        of_weights(model, targets(model), ["gradient"], [x], functional.cross_entropy, seed=seed)["0.weight"][
            "gradient"
        ]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert float(found[0].abs().max()) < 0.05  # labels as the model gives them: no slope on average


def test_refusals() -> None:
    model = net()
    members = named(model, "3.weight")
    with pytest.raises(DataError, match="1: x: gradients need the task's loss"):
        weight_statistics(model, ["gradient"], members, Known(batches()), "1: x")
    with pytest.raises(DataError, match="1: x needs data to gather statistics from"):
        weight_statistics(model, ["gradient"], members, Known(None, functional.cross_entropy), "1: x")
    with pytest.raises(DataError, match="loss fails while gradients are taken"):
        of_weights(model, members, ["gradient"], [(torch.randn(2, 4), torch.zeros(9).long())], functional.cross_entropy)
    with pytest.raises(DataError, match=r"gradient of 3\.weight: there are NaN"):
        of_weights(model, members, ["fisher"], batches(), lambda y, _: y.sum() * torch.nan)
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[3](model[0](x))  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"no calibration batch reaches unused\.weight with a gradient"):
        of_weights(model, named(model, "3.weight", "unused.weight"), ["gradient"], batches(), functional.cross_entropy)
    with pytest.raises(ValueError, match="has no parameter 'input'"):
        gather(model, {"0": [("input", "gradient")]}, batches(), None, functional.cross_entropy)


class Block(nn.Module):
    """Two layers on one input and one after them; takes a mask that all blocks share, and a cache that it fills."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor, cache: Any = None) -> Tensor:
        cache.append(x)
        assert len(cache) < 4, "the cache of an earlier run came back"
        return x + self.c(self.a(x) * torch.sigmoid(self.b(x))) * scale


class Decoder(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers, self.head = nn.Linear(4, 4), nn.ModuleList(Block() for _ in range(3)), nn.Linear(4, 3)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        scale, cache = torch.tensor(0.5), UserList()  # type: ignore[var-annotated]
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h + 0 if self.broken else h, scale, cache=cache)
        return self.head(h)


def weights(model: nn.Module) -> list[Target]:
    return [t for t in targets(model) if t.is_weight]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("order", ["block", "layer"])
def test_each_part_is_gathered_after_those_before_it_changed(order: str, broken: bool) -> None:
    model, data = Decoder(broken), batches()
    seen: list[list[str]] = []
    with torch.no_grad():
        for part, find in walk(model, weights(model), data, None, order):
            seen.append([t.name for t in part])
            found = find(["second_moment"])
            expected = of_weights(model, part, ["second_moment"], data)
            for target in part:
                torch.testing.assert_close(found[target.name], expected[target.name])
                target.tensor.mul_(0.7)
    inner = [["a", "b", "c"]] if order == "block" else [["a", "b"], ["c"]]
    parts = [[f"layers.{i}.{name}.weight" for name in part] for i in range(3) for part in inner]
    assert seen == [["embed.weight"], *parts, ["head.weight"]]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_run_on_their_own_where_one_feeds_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {}
    for broken in (False, True):
        model, count = Decoder(broken), []
        model.embed.register_forward_hook(lambda *_, count=count: count.append(1))
        for part, find in walk(model, [t for t in weights(model) if "layers" in t.name], batches(), None, "block"):
            assert part and find(["second_moment"])
        calls[broken] = len(count)
    assert calls == {False: 1 + 3, True: 1 + 3 * 3}  # one look; then each batch once, or once per block


def test_layers_with_one_input_share_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = Decoder(), []
    real = walking.Watch
    monkeypatch.setattr(walking, "Watch", lambda m, wanted: made.append(list(wanted)) or real(m, wanted))
    for _, find in walk(model, [t for t in weights(model) if "layers.1" in t.name], batches(), None, "block"):
        found = find(["gram"])
    assert made == [["layers.1.a", "layers.1.c"]]
    assert found["layers.1.a.weight"]["gram"] is found["layers.1.b.weight"]["gram"]


def test_blocks_are_found_by_structure() -> None:
    assert blocks(Decoder()) == ["layers.0", "layers.1", "layers.2"]
    stages = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Tanh())), nn.Flatten())
    assert blocks(stages) == ["0", "1.0", "1.1", "2"]
    assert blocks(nn.Linear(2, 2)) == []


def test_a_part_that_nothing_reaches_is_named() -> None:
    model = Decoder()
    model.spare = nn.Linear(4, 4)
    with pytest.raises(DataError, match="no calibration batch reaches the input of 'spare'"):
        for _, find in walk(model, weights(model), batches(), None, "block"):
            find(["gram"])
    with pytest.raises(DataError, match="no calibration batch"):
        list(walk(model, weights(model), [], None, "block"))
