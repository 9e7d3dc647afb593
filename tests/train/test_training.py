"""The training seam: gradients, ramps, ties, what is stored afterwards."""

import copy

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.errors import DataError, RecipeError, RuleError, SmeltError
from smelt.core.settings import Ramp
from smelt.core.store import check_fresh, eat, renew, store_of
from smelt.core.target import targets
from smelt.methods.distill.logits import Logits
from smelt.methods.prune.weights import Weights
from smelt.methods.share.kmeans import KMeans


def steps(model: nn.Module, t: smelt.training, n: int = 20, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.Adam(t.parameters(), lr)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > x[:, 1]).long()
    losses = []
    for _ in range(n):
        out = model(x)
        loss = t.loss(x, out, y, nn.functional.cross_entropy(out, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        t.step()
        losses.append(loss.item())
    return losses


def zeros(tensor: Tensor) -> float:
    return float((tensor == 0).float().mean())


def test_gradual_pruning_reaches_its_ratio_and_is_stored(model: nn.Sequential) -> None:
    with smelt.training(model, [Weights(ratio=Ramp(0, 0.75))], steps=20) as t:
        assert zeros(model[2].weight) < 0.1
        losses = steps(model, t)
        assert t.settled
        inside = model[2].weight.detach().clone()
    assert losses[-1] < losses[0]
    assert zeros(model[2].weight) == 0.75
    assert str(store_of(model).entries["2.weight"].encoded) == "sparse"
    assert (inside != 0).sum() == (model[2].weight != 0).sum()
    check_fresh(model)


def test_masks_survive_fine_tuning_and_values_learn(model: nn.Sequential) -> None:
    with smelt.training(model, [Weights(ratio=0.5)], steps=4) as t:
        steps(model, t, 4)
    before = model[2].weight.detach().clone()
    with smelt.training(model, steps=20) as t:
        steps(model, t)
    after = model[2].weight.detach()
    assert torch.equal(before == 0, after == 0)
    assert not torch.equal(before, after)
    check_fresh(model)


def test_after_sharing_only_the_codebook_learns(model: nn.Sequential) -> None:
    result = smelt.compress(model, [KMeans(clusters=8)])
    shared = result.model
    codes = dict(store_of(shared).entries["2.weight"].encoded.leaves())["indices"].clone()
    with smelt.training(shared, steps=20) as t:
        learning = {name for name, p in t.named_parameters() if p.requires_grad and name.startswith("2.weight")}
        assert learning == {"2.weight/codebook"}
        steps(shared, t)
    assert len(shared[2].weight.unique()) <= 8
    assert not torch.equal(shared[2].weight, result.report and model[2].weight)
    assert torch.equal(dict(store_of(shared).entries["2.weight"].encoded.leaves())["indices"], codes)
    check_fresh(shared)


def test_gradient_of_a_codebook_is_the_sum_over_its_members() -> None:
    layer = nn.Sequential(nn.Linear(3, 20, bias=False))
    shared = smelt.compress(layer, [KMeans(clusters=2)]).model
    x = torch.randn(7, 3)
    with smelt.training(shared) as t:
        shared(x).pow(2).sum().backward()
        gradient = next(iter(t.parameters())).grad
        dense = shared[0].weight.detach().clone().requires_grad_()
    (x @ dense.T).pow(2).sum().backward()
    indices = dict(store_of(shared).entries["0.weight"].encoded.leaves())["indices"].long()
    expected = torch.zeros(2).index_add(0, indices.flatten(), dense.grad.flatten())  # type: ignore[union-attr]
    assert gradient is not None and torch.allclose(gradient, expected, rtol=1e-4)


def test_pruned_weights_get_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    weight = model[0].weight
    with smelt.training(model, [Weights(ratio=0.5)]):
        model(torch.randn(8, 4)).sum().backward()
        mask = model[0].weight.detach() != 0
        assert weight.grad is not None
        assert torch.equal(weight.grad != 0, mask)


def test_two_codecs_act_on_one_tensor_in_order(model: nn.Sequential) -> None:
    with smelt.training(model, [Weights(ratio=0.5), KMeans(clusters=4)], steps=10) as t:
        steps(model, t, 10)
    weight = model[2].weight
    assert zeros(weight) >= 0.5 and len(weight.unique()) <= 5
    assert str(store_of(model).entries["2.weight"].encoded) == "sparse(values: codebook)"
    check_fresh(model)


def test_tied_weights_stay_tied_and_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model = Tied()
    x = torch.arange(12)
    with smelt.training(model, [Weights(ratio=0.5)], steps=5) as t:
        assert len(list(t.parameters())) == 1
        optimizer = torch.optim.SGD(t.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x).backward()
            optimizer.step()
            t.step()
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head.weight, nn.Parameter)
    assert list(store_of(model).entries) == ["embed.weight"]


def test_recurrent_layers_use_the_stored_weights() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    with smelt.training(model, [Weights(ratio=0.9)]) as t:
        inside = model(x)[0].detach()
        assert len(list(t.parameters())) == 4
    outside = model(x)[0].detach()
    fresh = nn.LSTM(3, 4)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(inside, outside)
    assert torch.equal(outside, fresh(x)[0].detach())


def test_attention_reads_weights_without_calling_their_module() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    with smelt.training(model, [Weights(ratio=0.8)]) as t:
        model(x, x, x)[0].sum().backward()
        assert all(p.grad is not None for p in t.parameters())
        inside = model(x, x, x)[0].detach()
    assert torch.allclose(inside, model(x, x, x)[0], atol=1e-6)


def test_an_exception_leaves_a_dense_model_and_stores_nothing(model: nn.Sequential) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), smelt.training(model, [Weights(ratio=0.5)], steps=4):
        raise KeyboardInterrupt
    assert not store_of(model).entries
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [n for n, _ in model.named_parameters()] == list(before)


def test_half_precision_trains_through_a_wide_master() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    with smelt.training(model, [Weights(ratio=0.25)]) as t:
        (master,) = t.parameters()
        assert master.dtype == torch.float32 and model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.dtype == torch.bfloat16 and zeros(model[0].weight) == 0.25


def test_distillation_equals_the_formula(model: nn.Sequential) -> None:
    teacher = copy.deepcopy(model)
    x, y = torch.randn(16, 2), torch.randint(0, 2, (16,))
    student = nn.Linear(2, 2)
    with smelt.training(student, [Logits(temperature=3, alpha=0.25)], teacher=teacher) as t:
        out = student(x)
        hard = nn.functional.cross_entropy(out, y)
        loss = t.loss(x, out, y, hard)
    p, q = torch.softmax(teacher(x) / 3, -1), torch.softmax(out / 3, -1)
    expected = 0.25 * hard + 0.75 * 9 * (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_what_is_refused(model: nn.Sequential) -> None:
    with pytest.raises(RecipeError, match="steps=N"):
        smelt.training(model, [Weights(ratio=Ramp(0, 0.5))])
    with pytest.raises(DataError, match="teacher"):
        smelt.training(model, [Logits()])
    with pytest.raises(RuleError, match="after train"):
        smelt.training(model, ["code.huffman"])
    shared = smelt.compress(model, [KMeans(clusters=4)]).model
    with pytest.raises(RuleError, match="no floating values left"), smelt.training(shared, [Weights()]):
        pass
    target = next(t for t in targets(shared) if t.name == "0.weight")
    with pytest.raises(RuleError, match=r"1: share\.kmeans keeps it as codebook"):
        eat(Weights(), target, shared, "2: prune.weights")


def test_an_error_while_leaving_restores_the_model(model: nn.Sequential) -> None:
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(SmeltError), smelt.training(model, [KMeans(clusters=4)]) as t, torch.no_grad():
        for p in t.parameters():
            p.fill_(float("nan"))
    assert [n for n, _ in model.named_parameters()] == names
    assert not model._forward_pre_hooks and all("weight" not in vars(model[i]) for i in (0, 2, 4))


def test_a_loop_that_ends_early_still_stores_the_end_of_the_ramp(model: nn.Sequential) -> None:
    piece = Weights(ratio=Ramp(0, 0.75))
    with pytest.warns(UserWarning, match="after 5 of 100"), smelt.training(model, [piece], steps=100) as t:
        steps(model, t, 5)
    assert zeros(model[2].weight) == 0.75


def test_leaves_shared_between_tensors_stay_shared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    shared = smelt.compress(model, [KMeans(clusters=2)]).model
    entries = store_of(shared).entries
    book = dict(entries["0.weight"].encoded.leaves())["codebook"]
    second = entries["1.weight"].encoded.map(lambda path, leaf: book if path == "codebook" else leaf)
    renew(shared, next(t for t in targets(shared) if t.name == "1.weight"), second)
    with smelt.training(shared, steps=3) as t:
        assert len(list(t.parameters())) == 1
        optimizer = torch.optim.SGD(t.parameters(), 0.1)
        shared(torch.randn(8, 4)).pow(2).sum().backward()
        optimizer.step()
    books = [dict(entries[n].encoded.leaves())["codebook"] for n in ("0.weight", "1.weight")]
    assert books[0] is books[1]
    check_fresh(shared)


def test_all_narrow_parameters_have_a_wide_master() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(torch.bfloat16)
    with smelt.training(model) as t:
        assert {p.dtype for p in t.parameters()} == {torch.float32}
        assert len(list(t.parameters())) == 4
        assert model(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_teacher_runs_in_evaluation_mode_and_keeps_its_mode() -> None:
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = nn.Linear(2, 2)
    x = torch.randn(16, 2)
    with smelt.training(student, [Logits()], teacher=teacher) as t:
        losses = {t.loss(x, student(x)).item() for _ in range(3)}
    assert len(losses) == 1 and teacher.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
