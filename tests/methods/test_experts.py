"""prune.experts on both layouts: statistics by hand, what is left equals what was, merged means."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.edit import Members, from_plain
from smelt.core.errors import DataError, FileError, ModelError, RecipeError, RuleError
from smelt.core.store import apply_edits, store_of
from smelt.graph.mixtures import mixtures
from smelt.methods.prune.experts import Experts
from smelt.methods.prune.weights import Weights

E, D, H = 6, 4, 8
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))


class Listed(nn.Module):
    """A list of experts with a linear gate."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, 2
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)) for _ in range(E))
        self.shared = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).softmax(-1).topk(self.top_k, -1)
        out = self.shared(x)
        for i in range(self.num_experts):
            token, slot = (index == i).nonzero(as_tuple=True)
            out = out.index_add(0, token, weight[token, slot, None] * self.experts[i](x[token]))
        return out


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = E
        self.up = nn.Parameter(torch.randn(E, H, D))
        self.up_bias = nn.Parameter(torch.randn(E, H))
        self.down = nn.Parameter(torch.randn(E, D, H))

    def forward(self, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            token, slot = (index == i).nonzero(as_tuple=True)
            hidden = torch.relu(x[token] @ self.up[i].T + self.up_bias[i])
            out = out.index_add(0, token, weight[token, slot, None] * (hidden @ self.down[i].T))
        return out


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, 2
        self.weight = nn.Parameter(torch.randn(E, D))
        self.register_buffer("correction", torch.zeros(E))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ((x @ self.weight.T).softmax(-1) + self.correction).topk(self.top_k, -1)  # type: ignore[return-value]


class Stacked(nn.Module):
    """Stacked experts beside a router of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Router(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x))  # type: ignore[no-any-return]


class Own(nn.Module):
    """All in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.n_experts, self.topk = E, 2
        self.router = nn.Parameter(torch.randn(E, D))
        self.up, self.down = nn.Parameter(torch.randn(E, H, D)), nn.Parameter(torch.randn(E, D, H))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = (x @ self.router.T).softmax(-1).topk(self.topk, -1)
        return torch.stack(
            [
                (w[:, None] * (self.down[i] @ (self.up[i] @ v)[..., None])[..., 0]).sum(0)
                for v, w, i in zip(x, weight, index, strict=True)
            ]
        )


class Net(nn.Module):
    """Two mixtures, and a count of their experts."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_local_experts = E
        self.layers, self.head = nn.ModuleList([kind(), kind()]), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def job() -> smelt.Job:
    return smelt.Job(data=smelt.Data(train=list(X.split(16))), latency=False)


def router(layer: Any) -> tuple[Tensor, Tensor | float]:
    gate = getattr(layer, "gate", None)
    return (layer.router, 0.0) if gate is None else (gate.weight, getattr(gate, "bias", 0.0))


@torch.no_grad()
def needed(layer: Any, x: Tensor, score: str = "routing") -> tuple[Tensor, Tensor]:
    """(score of each expert, logits), by hand."""
    weight, bias = router(layer)
    logits = x @ weight.T + bias
    p = logits.softmax(-1)
    total = torch.zeros(E)
    for row in p:
        for i in sorted(range(E), key=lambda i: -float(row[i]))[:2]:
            total[i] += row[i] if score == "routing" else 1
    return total, logits


@pytest.mark.parametrize("score", ["routing", "frequency"])
@pytest.mark.parametrize("kind", [Listed, Stacked, Own])
@torch.no_grad()
def test_the_most_needed_stay_as_they_are(kind: Any, score: str, tmp_path: Any) -> None:
    model = Net(kind).eval()
    result = smelt.compress(model, [Experts(keep=4, score=score)], job())
    assert result.model.num_local_experts == 4
    x = X
    for before, after in zip(model.layers, result.model.layers, strict=True):
        kept = sorted(needed(before, x, score)[0].sort(descending=True, stable=True).indices[:4].tolist())
        assert torch.equal(router(after)[0], router(before)[0][kept])
        own = dict(after.named_parameters())
        for name, p in before.named_parameters():
            if kind is Listed and name.startswith("experts."):
                _, i, rest = name.split(".", 2)
                if int(i) in kept:
                    assert torch.equal(own[f"experts.{kept.index(int(i))}.{rest}"], p)
            elif not name.startswith("shared"):
                assert torch.equal(own[name], p[kept])
        # The same as routing to those that stay alone.
        bias = router(before)[1]
        outside = torch.tensor([i not in kept for i in range(E)])
        if kind is Listed:
            assert isinstance(bias, Tensor)
            bias.masked_fill_(outside, -torch.inf)
            torch.testing.assert_close(after(x), before(x))
            bias.masked_fill_(outside, 0)
        x = x + model.layers[0](x)
    assert result.model(X).shape == (40, 2)
    result.save(tmp_path / "few.smelt")
    loaded = smelt.load(tmp_path / "few.smelt", into=Net(kind))
    assert torch.equal(loaded(X), result.model(X))
    assert (tmp_path / "few.smelt").stat().st_size < smelt.save(model, tmp_path / "all.smelt")


@pytest.mark.parametrize("kind", [Listed, Stacked, Own])
@torch.no_grad()
def test_merged_experts_are_means_by_frequency_of_the_most_alike(kind: Any) -> None:
    model = Net(kind).eval()
    layer = model.layers[0]
    merged = smelt.compress(model, [Experts(keep=3, how="merge", score="frequency")], job()).model.layers[0]
    count, logits = needed(layer, X, "frequency")
    kept = sorted(count.sort(descending=True, stable=True).indices[:3].tolist())
    alike = nn.functional.cosine_similarity(logits[:, :, None], logits[:, None, :], dim=0)
    home = [i if i in kept else kept[int(alike[i, kept].argmax())] for i in range(E)]
    assert len(set(home)) == 3 and torch.equal(router(merged)[0], router(layer)[0][kept])
    for place, i in enumerate(kept):
        group = [j for j in range(E) if home[j] == i]
        share = count[group] / count[group].sum()
        if kind is Listed:
            expected = sum(s * layer.experts[j][0].weight for s, j in zip(share, group, strict=True))
            found = merged.experts[place][0].weight
        else:
            holder = layer if kind is Own else layer.experts
            expected = sum(s * holder.down[j] for s, j in zip(share, group, strict=True))
            found = (merged if kind is Own else merged.experts).down[place]
        torch.testing.assert_close(found, expected)


def test_counts_and_shares() -> None:
    model = Net(Stacked).eval()
    half = smelt.compress(model, [Experts(ratio=0.5)], job()).model
    assert [layer.experts.up.shape[0] for layer in half.layers] == [3, 3]
    assert [(layer.experts.num_experts, layer.gate.num_experts) for layer in half.layers] == [(3, 3)] * 2
    assert half.layers[0].gate.correction.shape == (3,) and half.layers[0].gate.top_k == 2
    one = smelt.compress(model, [{"prune.experts": {"keep": 4, "on": "layers.1.*"}}], job()).model
    assert [layer.experts.num_experts for layer in one.layers] == [6, 4]
    assert one.num_local_experts == 6  # they do not agree
    some = smelt.compress(model, [{"prune.experts": {"on": "layers.1.experts.up"}}], job())
    assert any("leaves layers.1.experts as it is: only some of its weights" in n for n in some.report.notes)
    with pytest.raises(RecipeError, match=r"keep 1 of the 6 experts of 'layers.0.experts', and a token gets 2"):
        smelt.compress(model, [Experts(keep=1)], job())
    with pytest.raises(RecipeError, match="give one of them"):
        Experts(keep=1, ratio=0.5)
    with pytest.raises(DataError, match="needs data to see which experts"):
        smelt.compress(model, [Experts()])
    with pytest.raises(RuleError, match=r"put 2: prune\.experts before 1: prune\.weights"):
        smelt.compress(model, [Weights(), Experts()], job())


def test_what_is_no_mixture() -> None:
    class Fixed(Listed):
        """Counts its experts by itself."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.experts[E - 1](x)

    notes = smelt.compress(Net(Fixed).eval(), [Experts()], job()).report.notes
    assert any("leaves layers.0.experts as it is: it does not run with fewer experts" in n for n in notes)

    class Plain(nn.Module):
        """Two equal layers, and a head with two outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)]), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[1](self.layers[0](x)))  # type: ignore[no-any-return]

    assert "no mixture of experts" in smelt.compress(Plain().eval(), [Experts()], job()).report.notes[0]
    convolutions = nn.Sequential(nn.Conv1d(2, 8, 3), nn.Flatten(), nn.Linear(16, 8))
    assert mixtures(convolutions) == ([], {})
    notes = smelt.compress(convolutions, [Experts()]).report.notes
    assert "1: prune.experts: the model has no mixture of experts" in notes

    class Silent(Stacked):
        def __init__(self) -> None:
            super().__init__()
            self.gate.k = self.gate.__dict__.pop("top_k")
            self.gate.forward = lambda x: (x @ self.gate.weight.T).softmax(-1).topk(self.gate.k, -1)  # type: ignore[method-assign]

    silent = Net(Silent).eval()
    assert any("give 'chosen'" in n for n in smelt.compress(silent, [Experts()], job()).report.notes)
    assert smelt.compress(silent, [Experts(chosen=2)], job()).model.layers[0].experts.num_experts == 4


def test_members_of_a_list() -> None:
    model = Listed()
    second = model.experts[4]
    apply_edits(model, [Members("experts", (1, 4))], "cut")
    assert len(model.experts) == 2 and model.experts[1] is second
    assert [e.to_plain() for e in store_of(model).edits] == [["members", "experts", "1,4"]]
    for path, index in (("experts", (2,)), ("gate", (0,)), ("experts", ())):
        with pytest.raises(ModelError, match="no ModuleList with such members"):
            Members(path, index).apply(model)
    assert from_plain(["members", "experts", "0-2"]) == Members("experts", (0, 1, 2))
    for plain in (["members", 3, "0"], ["members", "x"], ["members", "x", 5], ["members", "x", "3-1"]):
        with pytest.raises(FileError, match="no edit"):
            from_plain(plain)
