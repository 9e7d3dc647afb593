"""quantize.gptq against optimal brain quantization one weight at a time, and what it must beat."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import smelt
from smelt.core.errors import DataError, RuleError
from smelt.core.method import Stats
from smelt.core.store import store_of
from smelt.grids import uniform
from smelt.methods.prune.sparsegpt import SparseGPT
from smelt.methods.quantize.affine import Affine
from smelt.methods.quantize.gptq import GPTQ
from smelt.statistics.gram import Gram, damped


def correlated(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) @ (torch.randn(k, k, generator=generator) + torch.eye(k))


def gram_of(x: Tensor) -> Tensor:
    statistic = Gram(nn.Linear(x.shape[1], 1))
    statistic.update(x)
    return statistic.result()


def weight(out: int, k: int) -> Tensor:
    return torch.randn(out, k, generator=torch.Generator().manual_seed(1))


def rounded(method: Any, w: Tensor, gram: Tensor, where: Tensor | None = None) -> Any:
    return method.encode(w, method.fit(w, Stats(where, {"gram": gram})))


def error(w: Tensor, q: Tensor, gram: Tensor) -> float:
    e = (w - q).double()
    return float(((e @ gram[0]) * e).sum())


def surgery(w: Tensor, h: Tensor, first: list[int], method: GPTQ) -> Tensor:
    """Codes; the rest moves by -(w_c - q_c) / [H^-1]_cc [H^-1]_c:, inverted anew each time, ranges as groups begin."""
    w, codes, left = w.double().clone(), torch.zeros_like(w), list(first)
    scale = zero = torch.zeros(0)
    for c in first:
        if c == first[0] or (method.per == "group" and c % method.group == 0):
            group = w if method.per == "channel" else w[:, c : c + method.group]
            scale, zero_ = uniform.steps(
                *uniform.minmax(group.float()), bits=method.bits, symmetric=method.symmetric, whole=False
            )
            zero = torch.zeros(()) if zero_ is None else zero_
        inverse = torch.linalg.inv(h[left][:, left])
        low, high = uniform.limits(method.bits, method.symmetric)
        codes[:, c] = (w[:, c] / scale + zero).round().clamp(low, high).float()
        q = (codes[:, c] - zero) * scale
        w[:, left] -= torch.outer((w[:, c] - q) / inverse[0, 0], inverse[0])
        left.pop(0)
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["channel", "group"])
def test_it_is_optimal_brain_quantization(per: str, symmetric: bool) -> None:
    w, gram = weight(7, 24), gram_of(correlated(400, 24))
    method = GPTQ(3, symmetric, per, group=8, range="minmax", scales="float32", rounds=0)
    expected = surgery(w, damped(gram[0], method.damp), list(range(24)), method)
    assert torch.equal(rounded(method, w, gram).parts["codes"].float(), expected)


def test_the_loudest_inputs_come_first_and_no_order_is_stored() -> None:
    w, gram = weight(5, 16), gram_of(correlated(400, 16) * torch.linspace(0.1, 3, 16)[torch.randperm(16)])
    method = GPTQ(3, per="channel", range="minmax", scales="float32", rounds=0, columns="loud")
    tree = rounded(method, w, gram)
    first = damped(gram[0], method.damp).diagonal().argsort(descending=True).tolist()
    assert torch.equal(tree.parts["codes"].float(), surgery(w, damped(gram[0], method.damp), first, method))
    assert set(tree.parts) == {"codes", "scale", "zero"}
    assert str(rounded(GPTQ(group=8, columns="loud"), w, gram)) == "affine"


def test_errors_fall_from_nearest_to_feedback_to_descent() -> None:
    w, gram = weight(48, 64), gram_of(correlated(600, 64) * torch.linspace(0.1, 2, 64))
    nearest = Affine(bits=3, per="group", group=16, symmetric=False, range="mse")
    methods = [nearest, *(GPTQ(3, group=16, rounds=rounds) for rounds in (0, 1, 5))]
    errors = [error(w, rounded(method, w, gram).decode(), gram) for method in methods]
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.95 * errors[1] and errors[3] <= errors[2]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per", ["channel", "tensor", "group"])
def test_every_width_and_layout_beats_nearest(bits: int, per: str) -> None:
    w, gram = weight(12, 20), gram_of(correlated(300, 20))
    for symmetric in (True, False):
        ours = rounded(GPTQ(bits, symmetric, per, group=8), w, gram)
        ours.form.check({k: (p.shape, p.dtype) for k, p in ours.leaves()}, ours.shape, ours.dtype)
        ours.form.awake(ours)
        nearest = rounded(Affine(bits=bits, symmetric=symmetric, per=per, group=8, range="mse"), w, gram)
        assert error(w, ours.decode(), gram) < error(w, nearest.decode(), gram)


def test_pruned_weights_stay_zero_and_are_made_up_for() -> None:
    w, gram = weight(8, 32), gram_of(correlated(400, 32))
    where = w.abs() > 0.6
    w = w * where
    state = GPTQ(3, group=16).fit(w, Stats(where, {"gram": gram}))
    found = GPTQ(3, group=16).encode(w, state).decode() * where
    plain = Affine(bits=3, per="group", group=16, symmetric=False, range="mse")
    nearest = plain.encode(w, plain.fit(w, Stats(where))).decode() * where
    assert error(w, found, gram) < 0.8 * error(w, nearest, gram)
    torch.testing.assert_close((w + state.shift)[~where], torch.zeros(int((~where).sum())))


@torch.no_grad()
def test_a_convolution_is_a_linear_layer_of_its_patches() -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), torch.randn(6, 4, 7, 7)
    settings: dict[str, Any] = {"bits": 3, "group": 6}
    job = smelt.Job(data=smelt.Data(train=[x]), latency=False)
    found = smelt.compress(nn.Sequential(conv), [GPTQ(**settings)], job).model[0].weight
    patches = functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 2, 18)
    for group in range(2):
        linear = nn.Linear(18, 3, bias=False)
        linear.weight.copy_(conv.weight[3 * group : 3 * group + 3].flatten(1))
        job = smelt.Job(data=smelt.Data(train=[patches[:, group]]), latency=False)
        alone = smelt.compress(nn.Sequential(linear), [GPTQ(**settings)], job).model[0].weight
        torch.testing.assert_close(found[3 * group : 3 * group + 3].flatten(1), alone, rtol=1e-3, atol=1e-4)


def test_aiming_at_the_original_makes_up_for_earlier_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    x = correlated(1500, 32) / 6
    job = smelt.Job(data=smelt.Data(train=list(x[:1000].split(250))), latency=False)
    errors = []
    for original in (False, True):
        found = smelt.compress(model, [GPTQ(2, group=16, original=original)], job).model
        errors.append(float((found(x[1000:]) - model(x[1000:])).detach().square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_after_pruning_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), correlated(400, 64)
    job = smelt.Job(data=smelt.Data(train=[x]), latency=False)
    result = smelt.compress(model, [SparseGPT(ratio=0.5), GPTQ(4)], job)
    assert str(store_of(result.model).entries["0.weight"].encoded) == "sparse(values: affine)"
    assert float((result.model[0].weight == 0).float().mean()) >= 0.5
    size = result.save(tmp_path / "a.smelt")
    again = smelt.load(tmp_path / "a.smelt", into=model)
    assert torch.equal(again(x), result.model(x))
    assert size < 0.35 * 4 * sum(p.numel() for p in model.parameters())


def test_groups_far_from_zero_keep_their_zero() -> None:
    w, gram = weight(4, 16) * 1e-3 + 5, gram_of(correlated(100, 16))
    tree = rounded(GPTQ(4, group=8), w, gram)
    assert tree.parts["zero"].dtype == torch.float32
    assert float((tree.decode() - w).abs().max()) < 5e-3


def test_refusals(model: nn.Sequential) -> None:
    with pytest.raises(DataError, match="needs data to gather statistics from"):
        smelt.compress(model, [GPTQ()])
    with pytest.raises(RuleError, match="second moments of the layer's inputs"):
        GPTQ().fit(torch.randn(4, 4), Stats())
    odd = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Flatten(1), nn.Linear(24, 6))
    data = smelt.Data(train=[torch.randn(8, 4, 4)])
    notes = " ".join(smelt.compress(odd, [GPTQ()], smelt.Job(data=data, latency=False)).report.notes)
    assert "0.weight" in notes and "transposed convolution share no inputs" in notes
