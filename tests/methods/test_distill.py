"""distill.*: the papers' formulas computed by hand, which layers are paired, what is learnt beside the model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smelt
from smelt.core.data import Batches, Data
from smelt.core.errors import DataError, RecipeError
from smelt.core.method import Look, Seen, State
from smelt.core.progress import Progress
from smelt.core.recipe import Recipe
from smelt.methods.distill.features import Features
from smelt.methods.distill.logits import Logits
from smelt.methods.distill.sequence import Sequence
from smelt.train.loop import Loop, fit

S = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
T = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 1, 1, 2])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def test_decoupled_by_hand() -> None:
    """Zhao et al. eq. 7: KD = TCKD + (1 - p_t) NCKD, and the terms themselves."""
    t = 3.0
    seen = Seen(None, S, LABELS, T)
    p, q = (T / t).softmax(-1), (S / t).softmax(-1)
    rows = torch.arange(5)
    pt, qt = p[rows, LABELS], q[rows, LABELS]
    target = pt * (pt / qt).log() + (1 - pt) * ((1 - pt) / (1 - qt)).log()
    others = []
    for i in range(5):
        rest = [j for j in range(4) if j != LABELS[i]]
        others.append(float(kl(p[i, rest] / p[i, rest].sum(), q[i, rest] / q[i, rest].sum())))
    torch.testing.assert_close(target + (1 - pt) * torch.tensor(others), kl(p, q))
    found = Logits(temperature=t, alpha=0.25, kind="decoupled", target=2.0, others=5.0).loss(seen)
    assert float(found) == pytest.approx(0.75 * t * t * (2 * float(target.mean()) + 5 * sum(others) / 5), rel=1e-5)
    padded = Seen(None, torch.cat([S, 9 * S]), torch.cat([LABELS, torch.full((5,), -100)]), torch.cat([T, T]))
    torch.testing.assert_close(
        Logits(temperature=t, alpha=0.25, kind="decoupled", target=2.0, others=5.0).loss(padded), found
    )
    with pytest.raises(DataError, match=r"a class for each output, \[5\]; labels: none"):
        Logits(kind="decoupled").loss(Seen(None, S, None, T))


def test_standardized_logits_by_hand() -> None:
    """Sun et al.: the deviation is that of the classes, divided by their number; scale and shift do not matter."""
    z = [[(v - sum(r) / 4) / math.sqrt(sum((u - sum(r) / 4) ** 2 for u in r) / 4) for v in r] for r in S.tolist()]
    w = [[(v - sum(r) / 4) / math.sqrt(sum((u - sum(r) / 4) ** 2 for u in r) / 4) for v in r] for r in T.tolist()]
    expected = 4 * kl((torch.tensor(w) / 2).softmax(-1), (torch.tensor(z) / 2).softmax(-1)).mean()
    act = Logits(temperature=2.0, alpha=0.0, standardize=True)
    torch.testing.assert_close(act.loss(Seen(None, S, None, T)), expected)
    torch.testing.assert_close(act.loss(Seen(None, 7 * S + 3, None, T)), expected)
    assert float(act.loss(Seen(None, 0.1 * T, None, T))) == pytest.approx(0, abs=1e-5)


def looked(kind: str, s: Tensor, t: Tensor, state: State | None = None, **settings: Any) -> float:
    seen = Seen(None, torch.zeros(1), features={"a": s}, teacher_features={"b": t}, look=Look(("a",), ("b",), state))
    return Features(kind=kind, **settings).loss(seen).item()


IMAGES = [torch.randn(3, c, 2, 2, generator=torch.Generator().manual_seed(c)) for c in (2, 4)]


def test_hint_by_hand() -> None:
    s, t = IMAGES
    weight, bias = torch.randn(4, 2), torch.randn(4)
    state = State(learn=("weight0", "bias0"), weight0=weight, bias0=bias)
    mapped = torch.einsum("oc,nchw->nohw", weight, s) + bias[:, None, None]
    assert looked("hint", s, t, state, strength=3.0) == pytest.approx(1.5 * float((mapped - t).pow(2).mean()), rel=1e-5)
    small = torch.nn.functional.avg_pool2d(t, 2)
    assert looked("hint", t, small) == pytest.approx(0, abs=1e-6)  # averaged down


def test_attention_by_hand() -> None:
    s, t = IMAGES
    total = 0.0
    for i in range(3):
        maps = [x[i].pow(2).sum(0).flatten() for x in (s, t)]
        total += float((maps[0] / maps[0].norm() - maps[1] / maps[1].norm()).norm())
    assert looked("attention", s, t) == pytest.approx(total / 3 / 2, rel=1e-5)
    words = [x.flatten(2).transpose(1, 2) for x in (s, t)]
    assert looked("attention", *words) == pytest.approx(total / 3 / 2, rel=1e-5)


def test_similarity_by_hand() -> None:
    grams = []
    for x in IMAGES:
        g = x.flatten(1) @ x.flatten(1).T
        grams.append(g / g.pow(2).sum(1, keepdim=True).sqrt())
    expected = float((grams[0] - grams[1]).pow(2).sum()) / 9
    assert looked("similarity", *IMAGES) == pytest.approx(expected, rel=1e-5)


def test_relational_by_hand() -> None:
    def huber(a: float, b: float) -> float:
        return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 0.5

    xs = [torch.randn(4, d, generator=torch.Generator().manual_seed(d)) * d for d in (3, 6)]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    triples = [(i, j, k) for i, j in pairs for k in range(4) if k not in (i, j)]
    far, cos = [], []
    for x in xs:
        mean = sum(float((x[i] - x[j]).norm()) for i, j in pairs) / len(pairs)
        far.append([float((x[i] - x[j]).norm()) / mean for i, j in pairs])
        cos.append([float(torch.cosine_similarity(x[i] - x[j], x[k] - x[j], 0)) for i, j, k in triples])
    expected = 3 * sum(map(huber, *far)) / len(pairs) + 5 * sum(map(huber, *cos)) / len(triples)
    assert looked("relational", *xs, distance=3.0, angle=5.0) == pytest.approx(expected, rel=1e-4)
    same = xs[0].clone().requires_grad_()
    seen = Seen(None, torch.zeros(1), features={"a": same}, teacher_features={"b": xs[0]}, look=Look(("a",), ("b",)))
    Features(kind="relational").loss(seen).backward()
    assert same.grad is not None and bool(torch.isfinite(same.grad).all())


def net(width: int, blocks: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)

    def stage(a: int, b: int) -> nn.Sequential:
        parts = [nn.Sequential(nn.Conv2d(a if not i else b, b, 3, padding=1), nn.ReLU()) for i in range(blocks)]
        return nn.Sequential(*parts)

    return nn.Sequential(
        stage(3, width),
        nn.MaxPool2d(2),
        stage(width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 5),
    )


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def pairs_of(piece: dict[str, Any], student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    act = Recipe.of([{"train": {"with": [{"distill.features": piece}]}}]).steps[0].pieces[0].act
    look = act.look(student, teacher, smelt.core.method.Known([(X, None)]))  # type: ignore[union-attr]
    return list(zip(look.features, look.teacher_features, strict=True))


def test_pairs_by_name_pattern_and_by_depth_and_shape() -> None:
    student, teacher = net(4, 1), net(6, 3)
    assert pairs_of({"layers": 2}, student, teacher) == [("2", "2"), ("4", "4")]  # the later sizes
    assert pairs_of({"layers": 3, "kind": "attention"}, student, teacher)[0] == ("0", "0")
    assert pairs_of({"pairs": [{"0": "0.1"}, "2: 2.0"]}, student, teacher) == [("0", "0.1"), ("2", "2.0")]
    deep = pairs_of({"pairs": {"2.?": "2.?"}}, net(4, 2), teacher)
    assert deep == [("2.0", "2.1"), ("2.1", "2.2")]
    for wrong, said in [
        ({"pairs": {"9": "0"}}, "no hidden layer of the model is called '9'"),
        ({"pairs": ["0:"]}, "no pair"),
    ]:
        with pytest.raises((DataError, RecipeError), match=said):
            pairs_of(wrong, student, teacher)
    with pytest.raises(DataError, match="equal widths"):
        pairs_of({"pairs": {"0": "0"}, "projector": False}, student, teacher)
    with (
        pytest.raises(DataError, match=r"needs data to see the sizes"),
        smelt.training(student, [Features()], teacher=teacher),
    ):
        pass


class StopAfter(Progress):
    def __init__(self, updates: int):
        self.updates = updates

    def advance(self, done: int, total: int, text: str = "") -> None:
        if done == self.updates:
            raise KeyboardInterrupt


def test_the_projector_learns_is_resumed_and_is_not_in_the_file(tmp_path: Path) -> None:
    data = Data(train=Batches(X.repeat(4, 1, 1, 1), None, 6))
    step = Recipe.of(
        [{"train": {"epochs": 3, "hold_out": 0, "keep": "last", "with": [{"distill.features": {"layers": 2}}]}}]
    ).steps[0]
    teacher, whole = net(6, 1, 1), net(4, 1)
    with smelt.training(net(4, 1), [Features(layers=2)], teacher=teacher, calibration=data.train) as t:
        names = [name for name, _ in t.named_parameters() if name.startswith("distill.features0.")]
        assert names == [f"distill.features0.{n}{i}" for i in (0, 1) for n in ("weight", "bias")]
        student = t.model
        t.loss(X, student(X)).backward()
        assert all(p.grad is not None for name, p in t.named_parameters() if name in names)
    fit(whole, step, Loop(data, teacher))
    loop = Loop(data, teacher, checkpoint=tmp_path / "a.training", minutes=0)
    with pytest.raises(KeyboardInterrupt):
        fit(net(4, 1), step, loop, StopAfter(6))
    resumed = net(4, 1)
    fit(resumed, step, loop)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    sizes = [smelt.save(one, tmp_path / f"{i}.smelt") for i, one in enumerate((resumed, net(4, 1, 5)))]
    assert abs(sizes[0] - sizes[1]) < 8


P, Q = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(s)) for s in (5, 6))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_divergences_of_sequences_by_hand(divergence: str) -> None:
    t, beta = 2.0, 0.3
    p, q = (P / t).softmax(-1), (Q / t).softmax(-1)
    m = beta * p + (1 - beta) * q
    rows = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[divergence]
    act = Sequence(divergence=divergence, beta=beta, temperature=t, alpha=0.5)
    torch.testing.assert_close(act.loss(Seen(torch.zeros(2, 3).long(), Q, None, P)), 0.5 * t * t * rows.mean())
    real = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = act.loss(Seen({"input_ids": real, "attention_mask": real}, Q, None, P))
    expected = 0.5 * t * t * (rows[0, 0] + rows[0, 1] + rows[1, 0]) / 3
    torch.testing.assert_close(loss, expected)
    labels = torch.where(real > 0, 2, -100)
    torch.testing.assert_close(act.loss(Seen(torch.zeros(2, 3).long(), Q, labels, P)), expected)
    torch.testing.assert_close(
        Sequence(divergence=divergence, beta=beta, temperature=t, alpha=0.5, pad=0).loss(Seen(real, Q, None, P)),
        expected,
    )


class Counting(nn.Module):
    """Says: the next token is the last one plus `step`; causal by construction."""

    def __init__(self, step: int, words: int = 12):
        super().__init__()
        self.sharp = nn.Parameter(torch.tensor(9.0))
        self.step, self.words = step, words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.sharp * nn.functional.one_hot((input_ids + self.step) % self.words, self.words).float()


def test_on_policy_the_student_writes_and_only_that_counts() -> None:
    student, teacher = Counting(2), Counting(1)
    texts = torch.tensor([[3, 4, 5, 6, 7], [7, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    pieces = [Sequence(on_policy=1.0, prompt=2, sampling=0.0, divergence="reverse")]
    with smelt.training(student, pieces, teacher=teacher) as t:
        made = t.prepare({"input_ids": texts, "attention_mask": mask})
        assert made["input_ids"].tolist() == [[3, 4, 6, 8, 10], [7, 9, 11, 1, 3]]
        assert made["attention_mask"].tolist() == [[1] * 5] * 2
        loss = t.loss(made, student(**made), guide=None)
        q, p = (student(**made)).log_softmax(-1), teacher(**made).log_softmax(-1)
        rows = (q.exp() * (q - p)).sum(-1)
        counted = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]])  # positions that predict what was drawn
        torch.testing.assert_close(loss, (rows * counted).sum() / 7)
        loss.backward()
        assert student.sharp.grad is not None and teacher.sharp.grad is None
    with smelt.training(student, [Sequence(on_policy=1.0, prompt=1, stop=8, sampling=0.0)], teacher=teacher) as t:
        made = t.prepare({"input_ids": torch.tensor([[4, 0, 0, 0, 0]]), "attention_mask": torch.ones(1, 5).long()})
        assert made["input_ids"].tolist() == [[4, 6, 8, 0, 0]] and made["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    with smelt.training(student, [Sequence(on_policy=0.5, prompt=1)], teacher=teacher, steps=40) as t:
        drawn = 0
        for t.done in range(40):
            drawn += t.prepare(texts) is not texts
            torch.testing.assert_close(t.prepare(texts), t.prepare(texts))
    assert 10 < drawn < 30
    for given, said in [
        (texts[:, :1], "none are drawn"),
        (texts.float(), "needs tokens"),
        ({"input_ids": texts, "attention_mask": mask.flip(1)}, "padded at their right"),
    ]:
        with (
            smelt.training(student, [Sequence(on_policy=1.0, prompt=1)], teacher=teacher) as t,
            pytest.raises(DataError, match=said),
        ):
            t.prepare(given)


def test_on_policy_in_a_loop_repeats() -> None:
    texts = torch.randint(0, 12, (16, 6), generator=torch.Generator().manual_seed(0))
    recipe = [
        {
            "train": {
                "epochs": 2,
                "hold_out": 0,
                "lr": 0.1,
                "with": [{"distill.sequence": {"on_policy": 0.7, "prompt": 2, "divergence": "jsd"}}],
            }
        }
    ]
    ends = []
    for _ in range(2):
        job = smelt.Job(data=Data(train=Batches(texts, None, 4)), teacher=Counting(1), latency=False)
        ends.append(smelt.compress(Counting(2), recipe, job).model.sharp.item())
    assert ends[0] == ends[1] != 9.0
