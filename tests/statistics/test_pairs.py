"""Moments of what a layer saw before with what it sees now, and of the loss's slopes at its outputs."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.core.statistic import of_weights
from smelt.core.target import Target, targets
from smelt.core.walk import walk
from smelt.statistics.cross import Cross
from smelt.statistics.gram import aimed, damped


def weights(model: nn.Module) -> list[Target]:
    return [t for t in targets(model) if t.is_weight]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def inputs(model: nn.Module, path: str, data: list[Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for x in data:
        model(x)
    handle.remove()
    return torch.cat(seen).double()


def test_pairs_know_what_came_before_anything_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(Block(), Block(), Block()), nn.Linear(5, 2))
    original, data = copy.deepcopy(model), [torch.randn(20, 4) for _ in range(3)]
    names = ["cross", "gram"]
    for order in ("layer", "block"):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for part, gather in walk(changed, weights(changed), data, None, order):
                found = gather(names)
                for target in part:
                    old, new = (inputs(one, target.places[0][0], data) for one in (original, changed))
                    torch.testing.assert_close(found[target.name]["cross"][0], old.T @ new / 60, rtol=1e-5, atol=1e-6)
                    torch.testing.assert_close(found[target.name]["gram"][0], new.T @ new / 60, rtol=1e-5, atol=1e-6)
                for target in part:
                    target.tensor.add_(0.1 * torch.randn(target.tensor.shape))
        assert not torch.equal(old, new)
        for a, b in zip(changed.parameters(), model.parameters(), strict=True):
            assert (a.dim() < 2) == torch.equal(a, b)


def test_where_nobody_knows_the_past_it_is_the_present() -> None:
    x, layer = torch.randn(30, 4), nn.Linear(4, 2)
    found = of_weights(layer, weights(layer), ["cross", "gram"], [x])["weight"]
    torch.testing.assert_close(found["cross"], found["gram"])


def test_convolutions_pair_place_by_place() -> None:
    layer, old, new = nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    statistic = Cross(layer)
    statistic.update(new, old)
    both = [functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 2, 18).double() for x in (old, new)]
    for group in range(2):
        expected = both[0][:, group].T @ both[1][:, group] / len(both[0])
        torch.testing.assert_close(statistic.result()[group], expected, rtol=1e-5, atol=1e-6)


def test_the_aim_is_least_squares_on_what_came_before() -> None:
    old = torch.randn(200, 6, dtype=torch.float64)
    new, w = old + 0.3 * torch.randn(200, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    gram, cross = new.T @ new / 200, old.T @ new / 200
    expected = torch.linalg.lstsq(new, old @ w.T).solution.T
    torch.testing.assert_close(aimed(w, gram, cross, gram), expected)
    far = aimed(w, damped(gram, 1e6), cross, gram)
    torch.testing.assert_close(far, w, rtol=1e-4, atol=1e-4)


def test_slopes_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, groups=2)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)).eval()
    data = [(torch.randn(5, 2, 5, 5), torch.randn(5, 3)) for _ in range(2)]
    found = of_weights(model, weights(model), ["slopes", "gram", "gradient"], data, functional.mse_loss)
    expected = {"0.weight": torch.zeros(2, 2, 2), "3.weight": torch.zeros(1, 3, 3)}
    for x, y in data:
        first = conv(x)
        last = model[3](first.relu().flatten(1))
        a, b = torch.autograd.grad(functional.mse_loss(last, y), [first, last])
        places = a.movedim(1, 3).reshape(-1, 2, 2)
        expected["0.weight"] += torch.einsum("pgi,pgj->gij", places, places) / 2
        expected["3.weight"] += (b.T @ b) / 2
    for name, moments in expected.items():
        torch.testing.assert_close(found[name]["slopes"].float(), moments, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_classes_are_drawn_from_the_outputs() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    data = [(torch.randn(2000, 6), torch.zeros(2000, dtype=torch.int64))]
    found = of_weights(layer, weights(layer), ["slopes"], data, functional.cross_entropy)["weight"]["slopes"][0]
    p = layer(data[0][0]).softmax(1).detach().double()
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(found * 2000, fisher, rtol=0.2, atol=0.02)
