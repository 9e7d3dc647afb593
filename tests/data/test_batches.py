import pytest
import torch
from torch import nn

from smelt.core.data import Batches, Data, batch, check, evaluating, fingerprint, forward, logits_of, samples
from smelt.core.errors import DataError, ModelError
from smelt.core.named import function_at, parse_call


def numbers(n: int = 10, **settings) -> Batches:
    return Batches(torch.arange(n).float()[:, None], torch.arange(n) % 3, **settings)


def drawn(batches: Batches) -> list[int]:
    return torch.cat([x for x, _ in batches]).flatten().int().tolist()


def test_batches_come_in_order_and_whole():
    found = list(numbers(10, batch_size=4))
    assert [len(x) for x, _ in found] == [4, 4, 2] and len(numbers(10, batch_size=4)) == 3
    assert all(torch.equal(y, x.flatten().long() % 3) for x, y in found)
    assert drawn(numbers()) == list(range(10))
    assert [y for _, y in Batches(torch.zeros(3, 1))] == [None]
    assert list(numbers(0)) == []


def test_an_epoch_repeats_exactly_and_differs_from_the_next():
    one = numbers(50, batch_size=7, shuffle=True, seed=3)
    first = drawn(one)
    assert drawn(one) == first and sorted(first) == list(range(50))
    one.set_epoch(1)
    second = drawn(one)
    assert second != first
    assert drawn(numbers(50, batch_size=7, shuffle=True, seed=4)) not in (first, second)
    one.set_epoch(0)
    assert drawn(one) == first


def test_the_transform_draws_from_seed_and_epoch_only():
    def noise(x, generator):
        return x + torch.rand(x.shape, generator=generator)

    one = numbers(10, batch_size=4, transform=noise)
    first = torch.cat([x for x, _ in one])
    torch.rand(5)
    assert torch.equal(torch.cat([x for x, _ in one]), first)
    one.set_epoch(1)
    assert not torch.equal(torch.cat([x for x, _ in one]), first)
    assert torch.equal(one.inputs.flatten(), torch.arange(10.0))


def test_split_is_disjoint_stratified_and_plain():
    def twice(x, generator):
        return 2 * x

    whole = Batches(torch.arange(90.0)[:, None], torch.arange(90) // 30, 8, shuffle=True, transform=twice)
    rest, held = whole.split(0.2, seed=1)
    assert (rest.samples, held.samples) == (72, 18)
    assert sorted(torch.cat([rest.inputs, held.inputs]).flatten().tolist()) == list(range(90))
    assert held.labels.bincount().tolist() == [6, 6, 6]
    assert rest.shuffle and rest.transform is twice and rest.batch_size == 8
    assert not held.shuffle and held.transform is None
    assert torch.equal(whole.split(0.2, seed=1)[1].inputs, held.inputs)
    assert not torch.equal(whole.split(0.2, seed=2)[1].inputs, held.inputs)
    assert Batches(torch.zeros(5, 1)).split(0.5)[1].samples == 3


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 0.01, 0.99, float("nan")])
def test_split_refuses_an_empty_part(fraction):
    with pytest.raises(DataError, match=r"of 10 samples"):
        numbers().split(fraction)


def test_fingerprint_follows_tensors_and_settings():
    base = numbers().fingerprint()
    assert numbers().fingerprint() == base and len(base) == 64
    others = [numbers(9), numbers(batch_size=2), numbers(shuffle=True), numbers(seed=1)]
    others += [numbers(transform=lambda x, g: x), numbers(transform=lambda x, g: x + 1)]
    others += [Batches(numbers().inputs), Batches(numbers().inputs.view(torch.int32), numbers().labels)]
    assert len({base, *(o.fingerprint() for o in others)}) == len(others) + 1


def test_fingerprint_sees_what_a_transform_closes_over():
    def shifted(by):
        return lambda x, g: x + by

    assert numbers(transform=shifted(1)).fingerprint() == numbers(transform=shifted(1)).fingerprint()
    assert numbers(transform=shifted(1)).fingerprint() != numbers(transform=shifted(2)).fingerprint()


def test_fingerprint_of_splits_is_unknown_for_other_loaders():
    known = fingerprint({"train": numbers(), "test": numbers(5), "valid": None})
    assert known == fingerprint({"test": numbers(5), "train": numbers()})
    assert known != fingerprint({"train": numbers(5), "test": numbers()})
    assert fingerprint({"train": numbers(), "test": [torch.zeros(1)]}) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"inputs": [1, 2]}, "list"),
        ({"inputs": torch.tensor(1.0)}, "one row per sample"),
        ({"inputs": torch.zeros(3), "labels": torch.zeros(2)}, r"\[3\] and labels \[2\]"),
        ({"inputs": torch.zeros(3), "batch_size": 0}, "batch_size is 0"),
        ({"inputs": torch.zeros(3), "batch_size": 1.5}, "batch_size is 1.5"),
    ],
)
def test_batches_refuse(arguments, said):
    with pytest.raises(DataError, match=said):
        Batches(**arguments)


def test_check_names_the_split():
    check(Data(numbers(), test=[(torch.zeros(2, 1), torch.zeros(2))]), labels=True, needs=("train", "test"))
    check(Data(test=[torch.zeros(2, 1)]))
    for data, said in [
        (Data(numbers()), "no 'test' split, and one is needed; it has train"),
        (Data(), "no split at all"),
        (Data(test=[]), "'test' is empty"),
        (Data(test=numbers(0)), "'test' is empty"),
        (Data(test=[torch.zeros(0, 2)]), "first batch is empty"),
        (Data(test=[torch.zeros(2, 1)]), "'test' has no labels"),
        (Data(test=iter([1])), "only once"),
        (Data(test=torch.zeros(2)), "is a Tensor"),
        (Data(test=3), "is a int"),
        (Data(test=[("text", 1)]), "holds no tensor"),
    ]:
        with pytest.raises(DataError, match=said):
            check(data, labels=True, needs=("test",))


def test_batch_normalises_what_loaders_yield():
    x, y, z = torch.zeros(2), torch.ones(2), torch.ones(1)
    assert batch((x, y)) == (x, y) and batch([x, y]) == (x, y)
    assert batch(x) == (x, None) and batch((x,)) == (x, None)
    assert batch((x, z, y)) == ((x, z), y)
    for key in ("labels", "label", "target"):
        assert batch({"a": x, key: y}) == ({"a": x}, y)
    assert batch({"a": x}) == ({"a": x}, None)
    for bad in ((), {}, {"labels": y}):
        with pytest.raises(DataError):
            batch(bad)


def test_forward_and_logits():
    class Sum(nn.Module):
        def forward(self, a, b=0):
            return a + b

    one = torch.ones(2)
    assert forward(Sum(), one).tolist() == [1, 1]
    assert forward(Sum(), (one, one)).tolist() == forward(Sum(), {"a": one, "b": one}).tolist() == [2, 2]
    assert samples((torch.zeros(3, 1), one)) == samples({"a": torch.zeros(3)}) == 3

    class Output:
        logits = one

    for output in (one, (one, 5), [one], {"logits": one, "loss": 0}, Output(), ({"logits": one},)):
        assert logits_of(output) is one
    for output in (None, (), {"loss": one}, "text"):
        with pytest.raises(ModelError, match="the model returns a"):
            logits_of(output)


def test_evaluating_restores_every_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].training = False
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False, True] and torch.is_grad_enabled()


def test_parse_call():
    assert parse_call("lenet", DataError) == ("lenet", {})
    assert parse_call("a:b(x=1, y=[2, 'c'], z=None)", DataError) == ("a:b", {"x": 1, "y": [2, "c"], "z": None})
    assert parse_call("lenet()", DataError) == ("lenet", {})
    for bad in (
        "f(1)",
        "f(x=g())",
        "f(x=1)(y=2)",
        "f(**{'a': 1})",
        "f(x=)",
        "f(x=1, x=2)",
        "f(x=1); g()",
        "f(x={[]: 1})",
    ):
        with pytest.raises(DataError, match="cannot read"):
            parse_call(bad, DataError)


def test_function_at(tmp_path, monkeypatch):
    (tmp_path / "functions_here.py").write_text("def good(): return 1\n")
    (tmp_path / "broken_here.py").write_text("raise RuntimeError('no luck')\n")
    (tmp_path / "needy_here.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"] + [p for p in __import__("sys").path if p])
    assert function_at("functions_here:good", DataError)() == 1
    for spec, said in [
        ("functions_here:goed", "did you mean 'good'"),
        ("nothing_here:good", "no module 'nothing_here'"),
        ("broken_here:good", "RuntimeError: no luck"),
        ("needy_here:good", "not_there_at_all"),
        ("a b:c", "not module:function"),
    ]:
        with pytest.raises(DataError, match=said):
            function_at(spec, DataError)


def test_a_transform_that_hides_its_content_has_a_fingerprint_of_its_own():
    class Hidden:
        def __call__(self, x, generator):
            return x

    hidden = Hidden()
    assert numbers(transform=hidden).fingerprint() != numbers(transform=hidden).fingerprint()
    one = numbers(transform=hidden)
    assert one.fingerprint() == one.fingerprint()
