"""Activations in few bits between the passes: exact where it is exact, right in the mean elsewhere, stored once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smelt
from smelt.core.data import Data
from smelt.core.errors import RecipeError, RuleError
from smelt.core.recipe import Recipe
from smelt.core.store import store_of
from smelt.forms import grouped
from smelt.grids import masks, stochastic
from smelt.train.loop import Loop, fit
from smelt.train.saved.acting import allocated
from tests.conftest import mlp


def saved(**settings: Any) -> dict[str, Any]:
    return {"quantize.stochastic": {"at": "saved", "bits": 2, **settings}}


class Call(nn.Module):
    """A function as a model, with a parameter so that there is something to train."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def slope(model: nn.Module, x: Tensor, pieces: list[Any], seed: int = 0) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(output, gradient of a random function of it at x, bytes)"""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with smelt.training(model, pieces, seed=seed) as t:
        y = model(x * 1)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype)
        (g,) = torch.autograd.grad((y * weight).sum(), x)
        t.step()
        return y.detach(), g, t.saved.bytes() if pieces else (0, 0)


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "in place": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.relu(),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "max pool 3": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool, dilated": lambda x: F.max_pool2d(x, 2, 1, 1, 2),
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_operations_have_the_same_gradient_bit_for_bit(name: str, last: bool, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, 11, 13, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    model = Call(EXACT[name])
    y, g, (taken, plain) = slope(model, x, [saved()])
    expected, exact, _ = slope(model, x, [])
    assert torch.equal(y, expected) and torch.equal(g, exact)
    assert taken * 4 < plain


def test_dropout_is_a_bit_for_each_element() -> None:
    model, x = Call(lambda x: F.dropout(x, 0.3)), torch.rand(64, 64) + 1
    y, g, (taken, _) = slope(model, x, [saved()])
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(y, torch.where(y != 0, x / 0.7, 0.0)) and 0.6 < float((y != 0).float().mean()) < 0.8
    assert torch.allclose(g, torch.where(y != 0, weight / 0.7, 0.0)) and taken == 64 * 64 // 8


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 5),
    )


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.randint(0, 5, (32,), generator=torch.Generator().manual_seed(4))


def gradients(model: nn.Module, pieces: list[Any], seed: int = 0, auto: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with smelt.training(model, pieces, seed=seed), torch.autocast("cpu", torch.bfloat16, enabled=auto):
        F.cross_entropy(model(X).float(), Y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_forward_pass_and_the_statistics_are_those_of_plain_training() -> None:
    plain, ours = net(), net()
    expected = plain(X)
    modules = dict(ours.named_modules())
    parameters = {n: p.clone() for n, p in ours.named_parameters()}
    with smelt.training(ours, [saved()]):
        out = ours(X)
        out.sum().backward()
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers(), strict=True))
    assert dict(ours.named_modules()) == modules  # the same objects
    assert all(torch.equal(p, parameters[n]) for n, p in ours.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in ours.modules())
    assert not store_of(ours).entries and not store_of(ours).activations


@pytest.mark.parametrize("auto", [False, True], ids=["fp32", "bf16"])
def test_with_eight_bits_the_gradient_is_nearly_the_exact_one(auto: bool) -> None:
    exact, ours = gradients(net(), [], auto=auto), gradients(net(), [saved(bits=8)], auto=auto)
    assert set(exact) == set(ours)
    for name in exact:
        assert ours[name].dtype == exact[name].dtype
        noise = float((ours[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-6))
        if float(exact[name].norm()) > 1e-5:  # a bias before a norm has no gradient
            assert noise < (0.1 if auto else 0.05), (name, noise)


def test_the_gradient_is_right_in_the_mean() -> None:
    """Of one draw the error is d; were the mean of 100 biased, its error would not come down to about d / 10."""
    model = net()
    exact = gradients(model, [])
    draws = [gradients(model, [saved(bits=2)], seed=s) for s in range(100)]
    for name in exact:
        if float(exact[name].norm()) < 1e-5:
            continue
        several = torch.stack([d[name] for d in draws])
        single = (several - exact[name]).flatten(1).norm(dim=1).mean()
        assert float((several.mean(0) - exact[name]).norm()) < 0.16 * float(single) + 1e-3 * float(
            exact[name].norm()
        ), name


def test_compiled_or_not_the_gradient_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = gradients(net(), [saved()])
    for module in (stochastic, masks, grouped):
        monkeypatch.setattr(module, "functions", lambda: None)
    assert all(torch.equal(g, compiled[name]) for name, g in gradients(net(), [saved()]).items())


def bytes_of(model: nn.Module, x: Tensor, **settings: Any) -> tuple[int, int]:
    with smelt.training(model.train(), [saved(**settings)]) as t:
        model(x).sum().backward()
        return t.saved.bytes()  # type: ignore[no-any-return]


def test_what_two_operations_need_is_stored_once() -> None:
    class Twice(nn.Module):
        def __init__(self, times: int):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(times))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer in self.layers]).sum(0)

    x = torch.randn(8, 8, 16, 16)
    one, three = bytes_of(Twice(1), x), bytes_of(Twice(3), x)
    assert one == three and one[1] == x.numel() * 4
    assert one[0] == x.numel() // 4 + x.numel() // 256 * 4  # two bits, and two ends for each group


def test_conv_norm_relu_conv_is_a_bit_for_signs_two_for_half_of_the_values_and_one_for_the_rest() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()
    )
    x = torch.randn(8, 3, 16, 16)
    taken, plain = bytes_of(model, x)
    n = 8 * 8 * 16 * 16
    assert plain == 4 * (x.numel() + 2 * n)
    inputs = x.numel() // 4 + x.numel() // 256 * 4
    assert abs(taken - inputs - n * (1 + 2 * 0.5 + 0.5) / 8) < n * 0.04


def test_what_is_counted_as_plain_is_what_autograd_holds() -> None:
    model = net()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(X)
    total = sum(t.untyped_storage().nbytes() for t in held.values())
    assert out.requires_grad and abs(bytes_of(net(), X)[1] - total) < 0.02 * total


def test_other_operations_save_through_hooks_without_parameters() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Attention().train(), torch.randn(8, 40, 32)

    def run(pieces: list[Any]) -> list[Tensor]:
        model.zero_grad()
        with smelt.training(model, pieces):
            model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    exact, ours = run([]), run([saved(rest=8)])
    for a, b in zip(exact, ours, strict=True):
        assert float((a - b).norm()) < 0.05 * float(a.norm()) + 1e-3
    assert any(not torch.equal(a, b) for a, b in zip(exact, ours, strict=True))
    taken, plain = bytes_of(model, x)
    assert 2 * taken < plain


@pytest.mark.parametrize("name", [*EXACT, "gelu", "norm", "linear", "dropout"])
def test_outputs_may_be_changed_in_place(name: str) -> None:
    """As residual blocks do, and even where autograd itself would need the values: the gradient is that of copies."""
    torch.manual_seed(0)
    more = {"gelu": nn.GELU(), "norm": nn.BatchNorm2d(8), "linear": nn.Linear(12, 12), "dropout": nn.Dropout(1e-9)}
    function = EXACT[name] if name in EXACT else more[name]

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.more, self.changes = more.get(name), False

        def forward(self, x: Tensor) -> Tensor:
            y = function(self.first(x))
            if not self.changes:
                return self.last(F.relu(y + 0.5) * 2)  # type: ignore[no-any-return]
            y += 0.5
            y = F.relu(y, inplace=True)
            y *= 2
            return self.last(y)  # type: ignore[no-any-return]

    model, x = Changed().train(), torch.randn(4, 8, 12, 12)
    found = []
    for pieces in ([], [saved(bits=8)]):
        model.changes = bool(pieces)
        model.zero_grad()
        with smelt.training(model, pieces):
            model(x).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float((found[0] - found[1]).norm()) < 0.02 * float(found[0].norm())


def test_a_weight_that_does_not_learn_needs_no_input() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].requires_grad_(False)
    assert bytes_of(model, torch.randn(64, 64))[1] == 64 * 64 * 4


def test_a_graph_is_used_twice_only_where_it_was_kept() -> None:
    model = net()
    with smelt.training(model, [saved()]):
        loss = F.cross_entropy(model(X), Y)
        first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        again = torch.autograd.grad(loss, list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="a second"):
            torch.autograd.grad(loss, list(model.parameters()))


def test_evaluation_and_interrupted_passes_leave_nothing_behind() -> None:
    model = net()
    with smelt.training(model, [saved()]) as t:
        with torch.no_grad():
            model(X)
        assert t.saved.bytes() == (0, 0)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4, 8, 8))
        F.relu(X.requires_grad_()).sum().backward()
        model(X.detach()).sum().backward()
    X.grad = None
    X.requires_grad_(False)


def test_on_selects_modules() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    x = torch.randn(64, 64)
    assert bytes_of(model, x, on="1.*")[1] == 2 * 64 * 64 * 4
    with pytest.raises(RecipeError, match="nowhere"):
        bytes_of(model, x, on="nowhere.*")


def test_bits_follow_the_variance_they_take_away() -> None:
    # Two pieces of 100 values at 2 bits (variance as 1 / (2^b - 1)^2), one 225 times as sensitive as the other.
    found = allocated({0: 225.0, 1: 1.0}, {0: 2, 1: 2}, {0: 100, 1: 100})
    assert found == {0: 3, 1: 1}
    assert allocated({0: 1.0, 1: 1.0}, {0: 2, 1: 2}, {0: 10, 1: 10}) == {0: 2, 1: 2}
    assert allocated({0: 0.0}, {0: 4}, {0: 10}) == {0: 1}


def test_adapted_bits_cost_no_more_and_disturb_less() -> None:
    model = net()
    exact = gradients(model, [])
    errors = []
    for pieces in ([saved(bits=2)], [saved(bits=2, adapt=100)]):
        taken, noise = [], 0.0
        with smelt.training(model, pieces) as t:
            for _ in range(20):
                model.zero_grad()
                t.loss(X, out := model(X), hard=F.cross_entropy(out, Y)).backward()
                t.step()
                taken.append(t.saved.bytes()[0])
                grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                noise += sum(float((grads[n] - exact[n]).square().sum()) for n in exact) if len(taken) > 1 else 0
        assert max(taken) <= 1.03 * taken[0]
        errors.append(noise)
    assert errors[1] < 0.8 * errors[0]


def test_it_is_part_of_a_recipe_and_the_file_has_nothing_of_it(data: Data, tmp_path: Path) -> None:
    step = {"train": {"epochs": 2, "lr": 1e-2, "precision": "bfloat16", "with": [saved(), "distill.logits"]}}
    result = smelt.compress(mlp(), {"steps": [step]}, smelt.Job(data=data, latency=False))
    assert any("bytes of activations where autograd saves" in note for note in result.report.notes)
    result.save(tmp_path / "a.smelt")
    assert not store_of(result.model).entries and not store_of(result.model).activations
    again = smelt.compress(mlp(), {"steps": [step]}, smelt.Job(data=data, latency=False))
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), again.model.parameters(), strict=True))


def test_it_goes_with_codecs_and_resumes_to_the_same_weights(data: Data, tmp_path: Path) -> None:
    from tests.train.test_loop import StopAfter, score

    pieces = [{"quantize.affine": {"bits": 4}}, saved(adapt=10)]
    step = Recipe.of({"steps": [{"train": {"epochs": 3, "with": pieces}}]}).steps[0]
    whole, broken = mlp(), mlp()
    fit(whole, step, Loop(data, score=score, seed=1))
    loop = Loop(data, score=score, seed=1, checkpoint=tmp_path / "state")
    batches = len(data.train)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        fit(broken, step, loop, StopAfter(batches + batches // 2))
    broken = mlp()
    fit(broken, step, loop)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_what_is_refused() -> None:
    with pytest.raises(RuleError, match="under train"):
        Recipe.of({"steps": [saved()]})
    with pytest.raises(RecipeError, match="does not act at 'saved'"):
        Recipe.of({"steps": [{"train": {"with": [{"share.kmeans": {"at": "saved"}}]}}]})
    with pytest.raises(RecipeError, match="bits cannot ramp at saved"):
        smelt.training(net(), [saved(bits={"ramp": [8, 2]})], steps=4)
    movement = {"prune.weights": {"ratio": 0.5, "score": "movement"}}
    with pytest.raises(RecipeError, match=r"which prune\.weights would count; take adapt out"):
        smelt.training(net(), [movement, saved(adapt=5)], steps=4)
    with pytest.raises(RecipeError, match="has no setting 'bit'"):
        smelt.training(net(), [saved(bit=2)])
