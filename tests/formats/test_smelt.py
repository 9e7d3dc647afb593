"""Models go through a file and come back the same."""

import copy
import hashlib
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.edit import Keep, Remove, Replace, Set, Tie
from smelt.core.encoded import Encoded
from smelt.core.errors import FileError, ModelError
from smelt.core.method import State, make
from smelt.core.source import Source
from smelt.core.store import Activation, apply_edits, store, store_of
from smelt.core.target import targets
from smelt.formats._container import DTYPES
from smelt.formats._file import File
from smelt.formats._words import WORDS
from smelt.formats.smelt import load, save, show
from smelt.forms.affine import Affine
from smelt.forms.codebook import Codebook
from smelt.forms.sparse import Sparse
from smelt.models import lenet300
from tests.formats import holder
from tests.formats.holder import Holder
from tests.formats.tiny import Tiny

TAIL = (make("code.huffman"), make("code.bits"))
LOOSE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def shelves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_registered", {})
    shelf.register("forms", "tiny", "tests.formats.tiny")
    shelf.register("models", "holder", "tests.formats.holder")


def affine(x: Tensor, **form: object) -> Encoded:
    scale = (x.float().abs().max() / 127 if x.numel() else torch.tensor(1.0)).clamp_min(1e-6)
    codes = (x.float() / scale).round().to(torch.int8)
    return Encoded(Affine(**form), {"codes": codes, "scale": scale}, x.shape, x.dtype)


def codebook(x: Tensor, book: Tensor | None = None) -> Encoded:
    book = torch.linspace(-1, 1, 16) if book is None else book
    indices = (x.float()[..., None] - book).abs().argmin(-1).to(torch.uint8)
    return Encoded(Codebook(), {"codebook": book, "indices": indices}, x.shape, x.dtype)


def sparse(x: Tensor, values: Tensor | Encoded | None = None) -> Encoded:
    mask = x.abs() > 0.5
    return Encoded(Sparse(), {"mask": mask, "values": x * mask if values is None else values}, x.shape, x.dtype)


def lenet(**arguments: object) -> nn.Module:
    """LeNet-300-100 as Deep Compression leaves it."""
    torch.manual_seed(0)
    model = lenet300.build(**arguments)  # type: ignore[arg-type]
    store_of(model).source = Source(builder="lenet300", arguments=arguments)
    for target in targets(model):
        x = target.tensor.detach()
        tree = affine(x)
        if target.is_weight:
            mask = x.abs() > x.abs().flatten().kthvalue(int(x.numel() * 0.92)).values
            inner = codebook(x, torch.linspace(float(x.min()), float(x.max()), 16))
            tree = Encoded(Sparse(), {"mask": mask, "values": inner}, x.shape, x.dtype)
        store(model, target, tree, "1: test")
    return model


def same(a: nn.Module, b: nn.Module) -> None:
    """The same dense tensors and the same trees."""
    ones, others = targets(a), targets(b)
    assert [(t.name, t.places) for t in ones] == [(t.name, t.places) for t in others]
    for one, other in zip(ones, others, strict=True):
        assert one.tensor.dtype == other.tensor.dtype and one.tensor.shape == other.tensor.shape
        assert bits(one.tensor) == bits(other.tensor)
        assert isinstance(one.tensor, nn.Parameter) == isinstance(other.tensor, nn.Parameter)
    trees, back = store_of(a).entries, store_of(b).entries
    assert trees.keys() == back.keys()
    for name in trees:
        leaves, found = dict(trees[name].encoded.leaves()), dict(back[name].encoded.leaves())
        assert str(trees[name].encoded) == str(back[name].encoded) and leaves.keys() == found.keys()
        if not isinstance(trees[name].encoded.form, Sparse):
            assert all(bits(leaves[k]) == bits(found[k]) for k in leaves)


def bits(x: Tensor) -> bytes:
    return bytes(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def test_the_fixed_cost_is_small(tmp_path: Path) -> None:
    model, path = lenet(), tmp_path / "net.smelt"
    size = save(model, path, tail=TAIL)
    assert size == path.stat().st_size
    assert size - File(path).leaf_bytes < 180
    recipe = {"steps": [{"train": {"epochs": 10, "with": [{"prune.weights": {"ratio": {"ramp": [0, 0.92]}}}]}}]}
    recipe["steps"] += [{"share.kmeans": {"clusters": 16}}, {"quantize.affine": {"bits": 8}}, {"code.huffman": {}}]
    report = [[i, name, 98.25 + i] for i in (0, 4) for name in ("bytes", "accuracy", "macs", "parameters")]
    with_report = save(model, path, tail=TAIL, recipe=recipe, report=report, force=True)
    assert with_report - size < 110
    assert File(path).recipe == recipe and File(path).report == report


def test_compressed_model_comes_back_and_is_written_again_the_same(tmp_path: Path) -> None:
    model, a, b = lenet(inputs=50, hidden=(20, 10)), tmp_path / "a", tmp_path / "b"
    save(model, a, tail=TAIL)
    before = torch.random.get_rng_state()
    back = load(a)
    assert torch.equal(before, torch.random.get_rng_state()) and not back.training
    same(model, back)
    assert store_of(back).source == Source(builder="lenet300", arguments={"inputs": 50, "hidden": [20, 10]})
    save(back, b, tail=TAIL)
    assert a.read_bytes() == b.read_bytes()
    save(load(a, into=lenet300.build(50, (20, 10))), b, tail=TAIL, force=True)
    assert a.read_bytes() == b.read_bytes()


def test_the_model_does_not_depend_on_its_file(tmp_path: Path) -> None:
    path = tmp_path / "net.smelt"
    save(model := lenet(inputs=50), path)
    back = load(path)
    path.write_bytes(bytes(path.stat().st_size))
    same(model, back)


def test_default_tails(tmp_path: Path) -> None:
    model = lenet(inputs=50)
    sizes = [save(model, tmp_path / "x", force=True, tail=t) for t in (None, (make("code.bits"),), (), TAIL)]
    assert sizes[0] <= sizes[3] < sizes[1] < sizes[2]
    store_of(model).tails = {t.name: TAIL for t in targets(model)}
    assert save(model, tmp_path / "x", force=True) <= sizes[0]
    same(model, load(tmp_path / "x"))


@st.composite
def models(draw: st.DrawFn) -> Holder:
    """Up to four tensors of any dtype and shape, the floating ones perhaps stored, perhaps with a shared codebook."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    book = torch.randn(draw(st.integers(1, 70)), generator=generator)
    tensors, trees = {}, {}
    for i in range(draw(st.integers(0, 4))):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        x = raw.view(dtype).reshape(shape) if dtype != torch.bool else (raw > 99).reshape(shape)
        if dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            x = torch.randn(shape, generator=generator).to(dtype)
            kind = draw(st.sampled_from(["dense", "affine", "codebook", "shared", "sparse", "deep", "tiny"]))
            tree = {
                "dense": lambda x: None,
                "affine": affine,
                "codebook": codebook,
                "shared": lambda x: codebook(x, book),
                "sparse": sparse,
                "deep": lambda x: sparse(x, codebook(x, book)),
                "tiny": lambda x: Encoded(Tiny(0.5), {"x": x.clone()}, x.shape, x.dtype),
            }[kind](x)
            if tree is not None:
                trees[f"t{i}"] = tree
        tensors[f"t{i}"] = x
    model = Holder(tensors)
    for target in targets(model):
        if target.name in trees:
            store(model, target, trees[target.name], "1: test")
    return model


@LOOSE
@given(models(), st.booleans())
def test_any_tree_dtype_and_shape(tmp_path: Path, model: Holder, coded: bool) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    tail = TAIL if coded else ()
    save(model, a, tail=tail, force=True)
    fresh = Holder({t.name: torch.zeros_like(t.tensor) for t in targets(model)})
    back = load(a, into=fresh)
    assert back is fresh
    same(model, back)
    save(back, b, tail=tail, force=True)
    assert a.read_bytes() == b.read_bytes()
    with File(a) as file:
        file.verify()
        assert file.names() == [t.name for t in targets(model)]
        for target in targets(model):
            assert bits(file.tensor(target.name)) == bits(target.tensor)
            assert (file.shape(target.name), file.dtype(target.name)) == (target.tensor.shape, target.tensor.dtype)
        assert sum(file.rest_bytes(name) for name in file.names()) == file.leaf_bytes
    assert sum(t["bytes"] for t in show(a)["tensors"]) == show(a)["leaf bytes"]


@pytest.mark.parametrize("tail", [(), TAIL])
def test_shared_leaves_are_written_once_and_shared_again(tmp_path: Path, tail: tuple) -> None:
    book = torch.sort((torch.arange(3000) % 7).float() / 7).values
    model = Holder({n: torch.rand(9, 9) for n in "abc"})
    for target in targets(model):
        store(model, target, codebook(target.tensor, book), "1: test")
    alone = Holder({"a": model.a.detach().clone()})
    store(alone, targets(alone)[0], codebook(alone.a, book), "1: test")
    size, one = save(model, tmp_path / "x", tail=tail), save(alone, tmp_path / "y", tail=tail)
    assert size < one + 300
    back = store_of(load(tmp_path / "x", into=Holder({n: torch.zeros(9, 9) for n in "abc"}))).entries
    first = back["a"].encoded.parts["codebook"]
    assert torch.equal(first, book)
    assert all(back[n].encoded.parts["codebook"] is first for n in "bc")
    with File(tmp_path / "x") as file:
        assert file.encoded("a").parts["codebook"] is file.encoded("c").parts["codebook"]


def test_leaves_lie_on_the_mapped_file_and_cannot_change_it(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    save(Holder({"pad": torch.zeros(65), "w": x}), tmp_path / "x", tail=())
    before = (tmp_path / "x").read_bytes()
    with File(tmp_path / "x") as file:
        w, again = file.tensor("w"), file.tensor("w")
        assert w.data_ptr() == again.data_ptr() and w.data_ptr() % 64 == 0
        w += 1
    assert torch.equal(w, x + 1)
    assert (tmp_path / "x").read_bytes() == before


def stored_net(**arguments: int) -> nn.Module:
    torch.manual_seed(1)
    model = holder.build(**arguments)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.5)
        else:
            tensor.fill_(3)
    store_of(model).source = Source(builder="holder", arguments=arguments)
    return model.eval()


LINEAR = ["Linear", {"in_features": 3, "out_features": 1, "bias": False}]
CHAIN = {"layers": [LINEAR, ["Linear", {"in_features": 1, "out_features": 2}]]}
EDITS = [
    Keep("fc1.weight", 0, (0, 1, 2, 5, 7)),
    Keep("fc1.bias", 0, (0, 1, 2, 5, 7)),
    Set("fc1", "out_features", 5),
    *(Keep(f"bn1.{n}", 0, (0, 1, 2, 5, 7)) for n in ("weight", "bias", "running_mean", "running_var")),
    Set("bn1", "num_features", 5),
    Keep("fc2.weight", 1, (0, 1, 2, 5, 7)),
    Keep("fc2.weight", 0, (0, 1, 2, 3, 4)),
    Set("fc2", "in_features", 5),
    Keep("rnn.weight_ih_l0", 1, (0, 1, 2, 3, 4)),
    Set("rnn", "input_size", 5),
    Replace("fc4", "chain", CHAIN),
    Replace("act", "chain", {"layers": [["LayerNorm", {"normalized_shape": 3}]]}),
    Tie("bn1.weight", "bn1.bias"),
]


def test_edits_ties_buffers_and_recurrent_nets(tmp_path: Path) -> None:
    model = stored_net()
    x = torch.randn(4, 6)
    apply_edits(model, EDITS, "1: test")
    for target in targets(model):
        if target.name in ("fc2.weight", "rnn.weight_ih_l0", "fc4.0.weight"):
            store(model, target, affine(target.tensor), "2: test")
    expected = model(x)
    save(model, tmp_path / "a")
    for back in (load(tmp_path / "a"), load(tmp_path / "a", into=holder.build())):
        same(model, back)
        assert back.fc2.weight is back.fc3.weight and back.bn1.weight is back.bn1.bias
        assert torch.equal(back.table, model.table)
        assert torch.equal(back(x), expected)
        assert store_of(back).edits == EDITS
        back.train()(x).sum().backward()
        assert back.fc2.weight.grad is not None
    back = load(tmp_path / "a")
    save(back, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert [e.to_plain() for e in File(tmp_path / "a").edits] == [e.to_plain() for e in EDITS]


def test_without_buffers_of_its_own_the_module_is_only_built_on_the_meta_device(tmp_path: Path) -> None:
    model = holder.build(shape=[3, 4])
    store_of(model).source = Source(builder="holder", arguments={"shape": [3, 4]})
    apply_edits(model, [Keep("w", 1, (0, 2))], "1: test")
    save(model, tmp_path / "a")
    holder.BUILT.clear()
    back = load(tmp_path / "a")
    assert holder.BUILT == ["built"] and back.w.device.type == "cpu" and back.w.shape == (3, 2) and back.w.requires_grad


def test_half_precision_comes_back_as_it_was(tmp_path: Path) -> None:
    model = stored_net().bfloat16()
    save(model, tmp_path / "a")
    same(model, load(tmp_path / "a"))
    with pytest.raises(FileError, match=r"fc1.weight is \[8, 6\] torch.bfloat16 in the file and .* torch.float32"):
        load(tmp_path / "a", into=holder.build())


def test_activations_are_installed_again(tmp_path: Path) -> None:
    shelf.register("methods", "test.act", "tests.formats.act")
    model = stored_net()
    state = State(scale=torch.tensor(0.25), nothing=None, offset=torch.arange(300.0), learn=("scale",))
    one = Activation("fc1", "input", make("test.act", {"bits": 3}), state)
    one.install(model)
    store_of(model).activations.append(one)
    save(model, tmp_path / "a")
    back = load(tmp_path / "a")
    x = torch.randn(5, 6)
    assert torch.equal(model(x), back(x)) and not torch.equal(back(x), stored_net()(x))
    found = store_of(back).activations[0]
    assert (found.path, found.at, found.codec) == ("fc1", "input", one.codec)
    assert isinstance(found.state.scale, nn.Parameter) and found.state.nothing is None
    assert torch.equal(found.state.offset, state.offset)
    save(back, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert show(tmp_path / "b")["activations"] == [["fc1", "input", "test.act"]]


def test_who_may_build(tmp_path: Path) -> None:
    model = stored_net()
    store_of(model).source = Source(builder="tests.formats.holder:build")
    save(model, tmp_path / "a")
    with pytest.raises(FileError, match=r"'tests.formats.holder:build', which is not part of smelt.*into=.*trust=True"):
        load(tmp_path / "a")
    same(model, load(tmp_path / "a", trust=True))
    store_of(model).source = Source(builder="tests.formats.holder:number")
    save(model, tmp_path / "a", force=True)
    with pytest.raises(FileError, match="returns a int, no module"):
        load(tmp_path / "a", trust=True)
    store_of(model).source = None
    save(model, tmp_path / "a", force=True)
    with pytest.raises(FileError, match="names no builder; pass into="):
        load(tmp_path / "a", trust=True)
    same(model, load(tmp_path / "a", into=holder.build()))


def test_into_must_fit(tmp_path: Path) -> None:
    save(stored_net(), path := tmp_path / "a")
    with pytest.raises(
        FileError, match=r"lacks 1 tensor\(s\) \(w\) and it alone has 14 tensor\(s\) \(fc1.weight, fc1.bias, bn1"
    ):
        load(path, into=Holder({"w": torch.zeros(3)}))
    into = holder.build(width=9)
    with pytest.raises(FileError, match=r"fc1.weight is \[8, 6\] torch.float32 in the file and \[9, 6\]"):
        load(path, into=into)
    compressed = load(path, into=holder.build())
    load(path, into=compressed)
    store_of(compressed).edits.append(Remove("fc4"))
    with pytest.raises(ModelError, match="compressed already"):
        load(path, into=compressed)


def test_a_module_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    model = stored_net()
    apply_edits(model, EDITS[:3], "1: test")
    save(model, tmp_path / "a")
    into = holder.build()
    into.fc4 = nn.Linear(3, 7)
    before = copy.deepcopy(into)
    with pytest.raises(FileError, match=r"fc4.weight"):
        load(tmp_path / "a", into=into)
    same(before, into)


def test_changed_behind_the_store(tmp_path: Path) -> None:
    model = lenet(inputs=50)
    with torch.no_grad():
        model.fc1.bias += 1
    with pytest.raises(ModelError, match=r"fc1.bias.*changed after 1: test"):
        save(model, tmp_path / "a")


def test_show(tmp_path: Path) -> None:
    save(lenet(inputs=50), path := tmp_path / "a", tail=TAIL, recipe={"steps": []}, report=[[0, "bytes", 3]])
    found = show(path)
    assert found["bytes"] == path.stat().st_size == found["leaf bytes"] + found["meta bytes"]
    assert (found["version"], found["builder"], found["arguments"]) == (1, "lenet300", {"inputs": 50})
    assert (found["recipe"], found["report"]) == ({"steps": []}, [[0, "bytes", 3]])
    first = found["tensors"][0]
    assert (first["name"], first["shape"], first["dtype"]) == ("fc1.weight", [300, 50], "float32")
    assert first["tree"] == "sparse(values: codebook)"
    assert first["rest"] == "sparse(positions: entropy, values: codebook(indices: entropy))"
    assert first["bits"] == 8 * first["bytes"] / 15000 < 1


def test_unknown_names(tmp_path: Path) -> None:
    save(lenet(inputs=50), path := tmp_path / "a")
    with pytest.raises(FileError, match=r"no tensor 'fc1.weigth'; did you mean 'fc1.weight'"):
        File(path).tensor("fc1.weigth")


def test_the_words_of_version_1_do_not_change() -> None:
    assert hashlib.sha256(WORDS).hexdigest()[:16] == "1f6690c869644124"
