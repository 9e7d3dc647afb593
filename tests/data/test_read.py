import os
import sys

import numpy as np
import pytest
import torch

from smelt.core.data import Data
from smelt.core.errors import DataError
from smelt.data._read import open_data


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def grey(n=10):
    return (np.arange(n * 16) % 256).astype(np.uint8).reshape(n, 4, 4)


def save(path, array, mode=None):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(array, mode).save(path) if mode else image.fromarray(array).save(path)


def test_built_in_names():
    assert open_data("digits").test.samples == 899
    data = open_data("digits(held_out=0.2)", batch_size=10, seed=3)
    assert data.test.samples == 359 and data.test.batch_size == 10 and data.train.seed == 3
    for spec, said in [
        ("digit", "did you mean 'digits'"),
        ("digits(held=0.2)", "no argument 'held'; did you mean 'held_out'"),
        ("digits(held_out=2)", "cannot hold out 2"),
        ("digits(held_out='a')", "TypeError"),
        ("digits(0.2)", "cannot read"),
    ]:
        with pytest.raises(DataError, match=said):
            open_data(spec)
    with pytest.raises(DataError, match="batch_size is 0"):
        open_data("digits", batch_size=0)
    with pytest.raises(DataError, match="folder of images only"):
        open_data("digits", size=4)


def test_npz_with_all_parts(here):
    colours = np.zeros((3, 4, 4, 3), np.uint8)
    colours[..., 2] = 255
    labels = np.arange(10, dtype=np.uint8)[:, None] % 2
    np.savez("a.npz", x_train=grey(), y_train=labels, x_test=colours, val_images=np.zeros((2, 5)), val_labels=[0.5, 1])
    data = open_data("a.npz", batch_size=5)
    assert data.name == "a" and data.train.shuffle and data.train.batch_size == 5 and len(data.fingerprint) == 64
    assert data.train.inputs.shape == (10, 1, 4, 4) and data.train.inputs[0, 0, 0, 1] == np.float32(1 / 255)
    assert data.train.labels.tolist() == labels[:, 0].tolist() and data.train.labels.dtype == torch.int64
    assert data.test.inputs.shape == (3, 3, 4, 4) and data.test.inputs[:, 2].unique().tolist() == [1]
    assert data.test.labels is None
    assert data.valid.inputs.shape == (2, 5) and data.valid.inputs.dtype == data.valid.labels.dtype == torch.float32


def test_npz_without_a_test_part_holds_out_a_fifth(here):
    np.savez("a.npz", x=np.arange(50), y=np.arange(50) % 5)
    data = open_data("a.npz", seed=2)
    assert (data.train.samples, data.test.samples) == (40, 10)
    assert data.test.labels.bincount().tolist() == [2] * 5 and data.train.inputs.dtype == torch.int64
    assert torch.equal(open_data("a.npz", seed=2).test.inputs, data.test.inputs)
    assert open_data("a.npz", seed=2).fingerprint == data.fingerprint != open_data("a.npz", seed=1).fingerprint


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros(3)}, "holds images; it needs x_train"),
        ({}, "holds nothing"),
        ({"x": np.zeros((3, 1)), "y": np.zeros(2, int)}, r"\[3, 1\] and labels \[2\]"),
        ({"x": np.array([[1.0, np.nan]])}, "x holds 1 NaN"),
        ({"x": np.array(["a", "b"])}, "x has dtype <U1"),
        ({"x": np.array([{}, None], dtype=object)}, "plain arrays"),
        ({"x": np.zeros((0, 3))}, "train part is empty"),
        ({"x": np.zeros((1, 3))}, "cannot hold out 0.2 of 1 samples"),
        ({"x": np.float32(1)}, "one row per sample"),
    ],
)
def test_npz_refused(here, arrays, said):
    np.savez("a.npz", **arrays)
    with pytest.raises(DataError, match=said):
        open_data("a.npz")


def test_damaged_npz(here):
    np.savez_compressed("a.npz", x=np.random.default_rng(0).random((100, 100)))
    whole = (here / "a.npz").read_bytes()
    flipped = whole[:5000] + bytes(200) + whole[5200:]
    np.save("b.npy", np.zeros(3))
    for content in (b"", b"text", whole[:5000], flipped, (here / "b.npy").read_bytes()):
        (here / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"'a\.npz' cannot be read"):
            open_data("a.npz")


def test_paths_that_are_nothing(here):
    (here / "notes.txt").write_text("x")
    for spec, said in [("notes.txt", "neither"), ("b.npz", "no such file"), ("a/b", "no such file")]:
        with pytest.raises(DataError, match=said):
            open_data(spec)


def test_folder_with_train_and_test(here):
    for split, n in (("train", 3), ("test", 2)):
        for label, kind in enumerate(("cat", "dog")):
            for i in range(n):
                save(here / "pets" / split / kind / f"{i}.png", np.full((4, 6), 51 * (label + 1), np.uint8))
    data = open_data("pets")
    assert data.name == "pets" and data.classes == ("cat", "dog") and data.valid is None
    assert data.train.inputs.shape == (6, 1, 4, 6) and data.test.inputs.shape == (4, 1, 4, 6)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.inputs[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.4, 0.4])
    assert open_data("pets", size=(2, 3)).train.inputs.shape == (6, 1, 2, 3)
    save(here / "pets/test/cow/0.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(DataError, match="cow"):
        open_data("pets")


def test_folder_of_classes_with_colours(here):
    for i in range(5):
        save(here / "flat" / "a" / f"{i}.jpg", np.full((4, 4), 255, np.uint8))
        save(here / "flat" / "b" / f"{i}.png", np.stack([np.full((4, 4), v, np.uint8) for v in (255, 0, 51)], -1))
    data = open_data("flat")
    assert data.train.inputs.shape == (8, 3, 4, 4) and data.test.labels.tolist() == [0, 1]
    assert data.test.inputs[1, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert data.test.inputs[0].min() > 0.98


def test_folders_refused(here):
    (here / "empty").mkdir()
    (here / "hollow" / "a").mkdir(parents=True)
    save(here / "sizes" / "a" / "0.png", np.zeros((4, 4), np.uint8))
    save(here / "sizes" / "a" / "1.png", np.zeros((5, 4), np.uint8))
    save(here / "deep" / "a" / "0.png", np.zeros((4, 4), np.uint16))
    (here / "bad" / "a").mkdir(parents=True)
    (here / "bad" / "a" / "0.png").write_bytes(b"no image")
    for spec, said in [
        ("empty", "no class folders"),
        ("hollow", "holds no images"),
        ("sizes", r"1\.png' has 5x4 pixels .* 4x4; give size="),
        ("deep", "8 bits per channel"),
        ("bad", r"0\.png' cannot be read"),
    ]:
        with pytest.raises(DataError, match=said):
            open_data(spec)
    for i in range(2, 6):
        save(here / "sizes" / "a" / f"{i}.png", np.zeros((i, 7), np.uint8))
    assert open_data("sizes", size=4).train.inputs.shape == (5, 1, 4, 4)


FUNCTIONS = """
import torch
from smelt.core.data import Batches, Data
def some(n=4): return Batches(torch.zeros(n, 2), torch.zeros(n))
def whole(batch_size=3, seed=0): return Data(Batches(torch.zeros(4, 2), None, batch_size, seed=seed))
def pair(n=4): return some(n), [torch.zeros(2)]
def parts(): return {"train": some(), "val": some(5)}
def foreign(): return {"train": some(), "tset": some()}
def number(): return 3
def nothing(): return {}
def once(): return some(), (x for x in some())
def tensors(): return torch.zeros(3), torch.zeros(3)
def anything(**given): return some(given["batch_size"])
def fails(): raise KeyError("gone\\nmore")
"""


def test_functions(here):
    (here / "my_loaders.py").write_text(FUNCTIONS)
    whole = open_data("my_loaders:whole", batch_size=2, seed=5)
    assert isinstance(whole, Data) and whole.train.batch_size == 2 and whole.train.seed == 5 and whole.fingerprint
    pair = open_data("my_loaders:pair(n=7)")
    assert pair.train.samples == 7 and pair.fingerprint is None and pair.name == "my_loaders:pair(n=7)"
    parts = open_data("my_loaders:parts")
    assert parts.valid.samples == 5 and parts.test is None and parts.fingerprint
    with pytest.raises(DataError, match="returns a Batches"):
        open_data("my_loaders:anything", batch_size=4)
    for spec, said in [
        ("foreign", "'tset'"),
        ("number", "returns a int"),
        ("nothing", "returns no split"),
        ("once", "'test' is a generator, which can be read only once"),
        ("tensors", "'train' is a Tensor"),
        ("fails", "KeyError: 'gone"),
        ("wholl", "did you mean 'whole'"),
        ("pair(m=1)", "no argument 'm'"),
    ]:
        with pytest.raises(DataError, match=said) as caught:
            open_data(f"my_loaders:{spec}")
        assert "\n" not in str(caught.value) and f"my_loaders:{spec.partition('(')[0]}" in str(caught.value)
    with pytest.raises(DataError, match="takes no batch_size"):
        open_data("my_loaders:pair", batch_size=4)


def test_opening_is_light():
    code = "import sys, smelt.data._read, smelt.models._open, smelt.data.digits; "
    code += "sys.exit(any(m in sys.modules for m in ('sklearn', 'PIL', 'torchvision')))"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
