import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smelt.core.errors import ModelError
from smelt.graph.groups import Group, groups
from smelt.graph.labels import Labels
from smelt.graph.sizes import Size
from smelt.graph.solve import Classes

from . import nets
from .nets import CASES, IMAGE, ROWS, TOKENS, Run, case


def found(model, x) -> dict[str, Group]:
    return {group.name: group for group in groups(model.eval(), x)[0]}


def parts(group: Group, unit: int) -> dict[tuple[str, int], list[int]]:
    return {(p.tensor, p.dim): p.index[unit].tolist() for p in group.parts}


@pytest.mark.parametrize("name", CASES)
def test_groups_of(name):
    model, x, expected = case(name)
    assert {name: group.size for name, group in found(model, x).items()} == expected


def test_what_a_channel_takes():
    group = found(nets.conv_chain(), torch.randn(IMAGE))["3.weight"]
    assert parts(group, 2) == {("3.weight", 0): [2], ("3.bias", 0): [2], ("7.weight", 1): [8, 9, 10, 11]}
    assert [p.role for p in group.parts] == ["out", "along", "in"]
    assert (group.kind, group.sets, group.fixed, group.exact) == ("channels", None, 0, True)


def test_a_key_head_goes_with_its_query_heads_and_rotary_dims_go_in_pairs():
    made = found(nets.Rotary(), torch.randn(2, 7, 10))
    heads, dims = made["q.weight"], made["q.weight (head dims)"]
    assert (heads.kind, dims.kind) == ("heads", "head dims")
    assert parts(heads, 1)["q.weight", 0] == parts(heads, 1)["o.weight", 1] == list(range(12, 24))
    assert parts(heads, 1)["v.weight", 0] == parts(heads, 1)["k.bias", 0] == list(range(6, 12))
    assert parts(dims, 1)["k.weight", 0] == [6 * head + d for head in range(4) for d in (1, 4)]
    assert parts(dims, 1)["frequencies", 0] == [1]


def test_gates_of_a_recurrent_layer_go_together():
    unit = parts(found(nets.recurrent(), torch.randn(TOKENS))["rnn.weight_ih_l0"], 3)
    assert unit["rnn.weight_hh_l1", 0] == [3, 11, 19, 27]
    assert unit["rnn.weight_ih_l1", 1] == unit["head.weight", 1] == [3]


def test_padding_stays():
    model = nets.padded()
    group = found(model, torch.randn(IMAGE))["stem.weight"]
    assert parts(group, 0)["b.weight", 0] == parts(group, 0)["head.weight", 1] == [2]
    assert group.fixed == 0 and found(model, torch.randn(IMAGE))["a.weight"].fixed == 0


def test_sets():
    sets = found(nets.halves(), torch.randn(ROWS))["up.weight"].sets
    assert sets.tolist() == [0] * 8 + [1] * 8
    assert found(nets.group_normed(), torch.randn(IMAGE))["0.weight"].sets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_what_runs_over_the_units_is_not_exact():
    assert not any(group.exact for group in found(nets.normed(), torch.randn(ROWS)).values())

    def scaled(m, x):
        return m.b(m.a(x) / m.width**0.5)

    model = Run(scaled, {"width": 8}, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    assert found(model, torch.randn(ROWS))["a.weight"].exact  # the number is no size here

    def attend(m, x):
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])

    model = Run(attend, qkv=nn.Linear(5, 24), out=nn.Linear(8, 3))
    assert not found(model, torch.randn(TOKENS))["qkv.weight"].exact


def refusals(run, shape=ROWS, numbers=None, **modules) -> dict[str, str]:
    return groups(Run(run, numbers, **modules).eval(), torch.randn(shape))[1]


def test_reasons_name_the_operator_and_the_module():
    def inverse(m, x):
        return m.b(torch.linalg.inv_ex(m.a(x))[0])

    reasons = refusals(inverse, a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    assert reasons["a.weight"] == "it goes through aten.linalg_inv_ex in Run"
    assert reasons["b.weight"] == "it is an output of the model"


def test_sizes_written_in_the_code_stay():
    def heads(m, x):
        y = m.a(x).view(len(x), 4, -1)
        return m.b((y * torch.softmax(y, 1)).flatten(1))

    model = Run(heads, a=nn.Linear(5, 16), b=nn.Linear(16, 3))
    group = found(model, torch.randn(ROWS))["a.weight"]
    assert (group.size, parts(group, 1)["b.weight", 1]) == (4, [1, 5, 9, 13])

    def both(m, x):
        return m.b(m.a(x).view(-1, 4, 4).flatten(1))

    assert "writes 4 in a view" in refusals(both, a=nn.Linear(5, 16), b=nn.Linear(16, 3))["a.weight"]

    def front(m, x):
        y = m.a(x)
        return m.b(y[:, :6]) + m.c(y)

    model = Run(front, a=nn.Linear(5, 16), b=nn.Linear(6, 3), c=nn.Linear(16, 3))
    group = found(model, torch.randn(ROWS))["a.weight"]
    assert (group.size, group.fixed, parts(group, 0)["a.weight", 0]) == (10, 6, [6])


def test_constants_and_indices_fix_what_they_meet():
    def table(m, x):
        return m.b(m.a(x) * torch.arange(8.0))

    assert "constant of arange" in refusals(table, a=nn.Linear(5, 8), b=nn.Linear(8, 3))["a.weight"]

    def picked(m, x):
        return m.b(m.a(x)[:, torch.tensor([3, 1, 0])])

    assert refusals(picked, a=nn.Linear(5, 8), b=nn.Linear(3, 3))["a.weight"] == "it is read by index in Run"


def test_what_only_training_uses_counts():
    def run(m, x):
        y = m.a(x)
        return (m.b(y), m.aux(y)) if m.training else m.b(y)

    model = Run(run, a=nn.Linear(5, 8), b=nn.Linear(8, 3), aux=nn.Linear(8, 2), spare=nn.Linear(4, 4))
    made, reasons = groups(model.eval(), torch.randn(ROWS))
    assert ("aux.weight", 1) in parts(made[0], 0)
    assert reasons["spare.weight"] == "the model did not use it on the example"


def test_looking_changes_nothing():
    model, x, _ = case("rotary")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    groups(model, x)
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert type(model.head_dim) is int and not model._forward_hooks and not model.q._forward_pre_hooks


def test_a_model_that_fails_is_named():
    with pytest.raises(ModelError, match=r"given float32 \[6, 5\]: 0 fails"):
        groups(nn.Sequential(nn.Linear(4, 3)), torch.randn(ROWS))


def test_two_ways_to_take_a_dimension_apart_leave_the_freer_one():
    labels = Labels()
    x = labels.fresh(24, "channels")
    labels.split(x, 4, 6)
    labels.split(x, 12, 2)
    classes = Classes(labels)
    left = {int(r) for r in classes.root[x] if not classes.fixed(np.array([r])).any()}
    assert len(left) == 4  # six of one, twelve of the other: their blocks of 6 and 2 have 4 unions


def test_split_undoes_product():
    labels = Labels()
    a, b = labels.fresh(3, "a"), labels.fresh(4, "b")
    x = labels.product(a, b, 3, 4)
    for axis in (x, x.copy(), x[4:]):
        first, second = labels.split(axis, len(axis) // 4, 4)
        assert np.array_equal(first, a[-len(first) :]) and np.array_equal(second, b)
    first, second = labels.split(labels.product("fixed", x, 2, 12), 6, 4)
    assert np.array_equal(first, np.tile(a, 2)) and np.array_equal(second, b)


def test_sizes_know_where_they_come_from():
    width = Size(12, ("m", "width", -1), [])
    half = width // 2
    assert (half, half.made, half.source) == (6, ("//", 12, 2), None) and half.made[1].source == ("m", "width", -1)
    assert (2 * width).made == (width * 2).made == ("*", 12, 2) and (width - 1).made == ("-", 12, 1)
    assert (width % 5, (width % 5).made) == (2, None) and not width.numbers
    assert half**0.5 and width.numbers == [("m", "width", -1)]
    assert torch.zeros(width, 2).view(2, width // 2, 2).shape == (2, 6, 2)
