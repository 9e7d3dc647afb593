import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smelt
from smelt.core.data import evaluating
from smelt.core.edit import Keep, Set, from_plain
from smelt.core.errors import ModelError
from smelt.core.source import Source
from smelt.core.store import apply_edits, store_of
from smelt.graph.cut import cut
from smelt.graph.groups import Group, groups
from smelt.models import resnet_digits

from . import nets
from .nets import CASES, ROWS, Run, case


def half(group: Group) -> list[int]:
    """Every second unit, of each set."""
    sets = torch.zeros(group.size) if group.sets is None else group.sets
    return sorted(i for s in sets.unique() for i in (sets == s).nonzero().flatten().tolist()[1::2])


def masked(model: nn.Module, keep: dict[Group, list[int]]) -> nn.Module:
    """The original with zeros where the cut units were."""
    made = copy.deepcopy(model)
    tensors = dict([*made.named_parameters(), *made.named_buffers()])
    for group, kept in keep.items():
        for part in group.parts:
            for unit in set(range(group.size)) - set(kept):
                tensors[part.tensor].data.index_fill_(part.dim, part.index[unit], 0)
    return made


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with evaluating(model):
        return model(x)


@pytest.mark.parametrize("name", CASES)
def test_cut_equals_masked_and_survives_the_file(name, tmp_path):
    model, x, _ = case(name)
    fresh, before = copy.deepcopy(model), run(model, x)
    made, _ = groups(model, x)
    everything = {group: half(group) for group in made}
    edits, refused = cut(model, x, everything)
    assert not refused
    assert torch.equal(run(model, x), before)
    places = [(e.tensor, e.dim) for e in edits if isinstance(e, Keep)]
    assert len(places) == len(set(places)) > 0
    assert [from_plain(e.to_plain()) for e in edits] == edits

    exact = {group: kept for group, kept in everything.items() if group.exact}
    alone, _ = cut(model, x, exact)
    small = copy.deepcopy(model)
    apply_edits(small, alone, "cut")
    torch.testing.assert_close(run(small, x), run(masked(model, exact), x), atol=1e-5, rtol=1e-5)

    apply_edits(model, edits, "cut")
    size = sum(p.numel() for p in model.parameters())
    assert size < 0.7 * sum(p.numel() for p in fresh.parameters())
    smelt.save(model, tmp_path / "cut.smelt", tail=())
    back = smelt.load(tmp_path / "cut.smelt", into=fresh)
    assert torch.equal(run(back, x), run(model, x))
    for module in back.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            sides = (module.in_channels, module.out_channels)
            whole, part = sides if isinstance(module, nn.ConvTranspose2d) else sides[::-1]
            assert module.weight.shape[:2] == (whole, part // module.groups)


def test_a_built_in_model_is_cut_and_built_again(tmp_path):
    torch.manual_seed(0)
    model = resnet_digits.build(channels=(8, 12), blocks=(1, 2))
    x = torch.randn(4, 1, 8, 8)
    made, _ = groups(model, x)
    edits, refused = cut(model, x, {group: half(group) for group in made})
    assert not refused
    apply_edits(model, edits, "cut")
    store_of(model).source = Source(builder="resnet_digits", arguments={"channels": [8, 12], "blocks": [1, 2]})
    smelt.save(model, tmp_path / "cut.smelt")
    assert torch.equal(run(smelt.load(tmp_path / "cut.smelt"), x), run(model, x))


def test_experts_that_nobody_met_are_cut_like_the_others():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(3))

        def forward(self, x):
            y = self.stem(x)
            return self.head(
                torch.cat([self.experts[int(row[0] > 0)](one[None]) for row, one in zip(x, y, strict=True)])
            )

    model, x = Experts().eval(), torch.randn(ROWS)
    made, _ = groups(model, -x.abs())
    assert [(g.name, g.size) for g in made] == [
        ("stem.weight", 8),
        ("experts.0.0.weight", 6),
        ("experts.0.2.weight", 8),
    ]
    keep = {group: half(group) for group in made}
    edits, refused = cut(model, -x.abs(), keep)
    small = copy.deepcopy(model)
    apply_edits(small, edits, "cut")
    assert not refused and small.experts[2][0].weight.shape == (3, 4)
    torch.testing.assert_close(run(small, x), run(masked(model, keep), x), atol=1e-5, rtol=1e-5)


def test_only_the_guilty_are_refused():
    def forward(m, x):
        y = F.relu(m.a(x))
        if y.shape[-1] not in (8,):
            raise RuntimeError("eight, please")
        return m.c(F.relu(m.b(y)))

    model = Run(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 12), c=nn.Linear(12, 3)).eval()
    x = torch.randn(ROWS)
    made, _ = groups(model, x)
    edits, refused = cut(model, x, {group: half(group) for group in made})
    assert list(refused) == ["a.weight"] and "eight, please" in refused["a.weight"]
    assert {e.tensor for e in edits if isinstance(e, Keep)} == {"b.weight", "b.bias", "c.weight"}


def test_what_would_be_shifted_is_refused():
    """The code does something else at another size; the shapes would still fit."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            self.scale = nn.Parameter(torch.rand(8))
            self.hidden = {"start": 2}

        def forward(self, x):
            y = self.a(x)
            start = self.hidden["start"] if y.shape[1] == 8 else 0
            return self.b(torch.cat([y[:, start:] * self.scale[start:], y[:, :start] * self.scale[:start]], 1))

    model, x = Net().eval(), torch.randn(ROWS)
    made, _ = groups(model, x)
    _, refused = cut(model, x, {group: half(group) for group in made})
    assert refused and "others than before" in next(iter(refused.values()))


def test_one_unit_may_be_left():
    for name in CASES:
        model, x, _ = case(name)
        made = [group for group in groups(model, x)[0] if group.sets is None]
        edits, refused = cut(model, x, {group: [group.size - 1] for group in made})
        assert not refused, name
        apply_edits(model, edits, "cut")
        run(model, x)


def test_attributes_follow():
    model, x, _ = case("pieces")
    made, _ = groups(model, x)
    edits, _ = cut(model, x, {made[0]: range(7)})
    assert [(e.attribute, e.value) for e in edits if isinstance(e, Set) and e.path == ""] == [("sizes", (7, 6))]
    model, x, _ = case("encoder")
    made = {group.name: group for group in groups(model, x)[0]}
    edits, _ = cut(model, x, {made["0.weight"]: (0, 2, 3)})
    values = {e.attribute: e.value for e in edits if isinstance(e, Set) and e.path == "1.self_attn"}
    assert values == {"embed_dim": 12, "num_heads": 3, "kdim": 12, "vdim": 12}
    model, x, _ = case("grouped")
    made = {group.name: group for group in groups(model, x)[0]}
    edits, _ = cut(model, x, {made["0.weight"]: (0, 3)})
    values = {e.attribute: e.value for e in edits if isinstance(e, Set) and e.path == "2"}
    assert values == {"groups": 2, "in_channels": 6, "out_channels": 4}


def test_heads_and_head_dims_at_once():
    model, x, _ = case("rotary")
    made = {group.name: group for group in groups(model, x)[0]}
    keep = {made["q.weight"]: [0, 1, 2], made["q.weight (head dims)"]: [0, 2]}
    edits, refused = cut(model, x, keep)
    small = copy.deepcopy(model)
    apply_edits(small, edits, "cut")
    assert not refused and small.q.weight.shape == (6 * 4, 10) and small.head_dim == 4
    torch.testing.assert_close(run(small, x), run(masked(model, keep), x), atol=1e-5, rtol=1e-5)


def test_bad_requests():
    model, x, _ = case("halves")
    (group,), _ = groups(model, x)
    with pytest.raises(ModelError, match="equally many"):
        cut(model, x, {group: [0, 1, 2]})
    with pytest.raises(ModelError, match="units 0 to 15"):
        cut(model, x, {group: []})
    with pytest.raises(ModelError, match="units 0 to 15"):
        cut(model, x, {group: [3, 16]})
    with pytest.raises(ModelError, match="other shapes"):
        cut(nets.gate(), x, {group: half(group)})
    assert cut(model, x, {group: range(16)}) == ([], {})


def test_lists_of_sizes_from_files_are_distrusted():
    model = nets.pieces()
    for value in ([1], [1, 2, 3], [1, "a"], 5, [True, 1]):
        with pytest.raises(ModelError):
            Set("", "sizes", value).apply(model)
    Set("", "sizes", (9, 6)).apply(model)
    assert model.sizes == [9, 6]
