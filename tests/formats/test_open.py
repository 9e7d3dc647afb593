"""Opened files give what safetensors gives, and decode no more than what was asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import smelt
from smelt.core.encoded import Encoded
from smelt.core.errors import FileError, ModelError
from smelt.core.method import make
from smelt.core.store import store, store_of
from smelt.core.target import targets
from smelt.formats._file import File
from smelt.forms.affine import Affine
from tests.formats.holder import Holder


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "matrix": torch.randn(700, 300, generator=generator) / 50,
        "half": (torch.randn(5, 40, 60, generator=generator) / 50).bfloat16(),
        "bytes": torch.randint(0, 256, (300, 70), generator=generator, dtype=torch.uint8),
        "mask": torch.rand(90, 50, generator=generator) > 0.9,
        "complex": torch.randn(50, 20, generator=generator, dtype=torch.complex64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    return made | {f"b{i}": torch.randn(100, generator=generator).half() for i in range(9)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("open") / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    smelt.pack(path)
    return path


@pytest.fixture
def packed(plain: Path) -> Path:
    return plain.with_suffix(".smelt")


def compressed(path: Path) -> nn.Module:
    """A model with a tensor that is stored in another form, in a file where every leaf is coded."""
    model = Holder({"w": torch.linspace(-1, 1, 6000).reshape(60, 100), "b": torch.arange(3000.0).reshape(30, 100)})
    codes = (model.w * 100).to(torch.int8)
    tree = Encoded(Affine(), {"codes": codes, "scale": torch.tensor(0.01)}, model.w.shape, model.w.dtype)
    store(model, targets(model)[0], tree, "1: test")
    smelt.save(model, path, tail=[make("code.entropy")])
    return model


INDEXES: list[Any] = [
    *(0, -1, 2, slice(1, 3), slice(None), slice(None, None, 2), slice(3, 1), slice(0, 10**6), slice(-2, None)),
    *((slice(1, 3), 0), (0, 1), ..., (..., 0), (slice(None), [0, 2]), [0, 1], [-1], [], None, (None, 0)),
    *(
        torch.tensor([0, 1]),
        True,
        slice(10**6, 10**7),
        (),
        (0, slice(None, None, 2)),
        np.int64(1),
        (slice(1, 2), ..., 3),
    ),
    *((..., slice(1, 4, 2)), (slice(2, 5), None, slice(0, 7))),
]


@pytest.mark.parametrize("name", ["matrix", "half", "bytes", "mask", "complex", "empty", "scalar", "b0", "b5"])
def test_slices_are_those_of_safetensors(plain: Path, packed: Path, name: str) -> None:
    with smelt.open(packed) as ours, smelt.open(plain) as theirs:
        a, b = ours.get_slice(name), theirs.get_slice(name)
        assert (a.get_shape(), a.get_dtype()) == (b.get_shape(), b.get_dtype())
        for index in INDEXES:
            try:
                expected = b[index]
            except Exception as error:
                with pytest.raises(type(error)):
                    a[index]
            else:
                found = a[index]
                assert found.dtype == expected.dtype and torch.equal(found, expected), index


@pytest.mark.parametrize(
    "index", [700, -701, slice(None, None, -1), (0, 300), (0, 0, 0), "a", 1.5, (slice(None), [999])]
)
def test_wrong_indexes(plain: Path, packed: Path, index: Any) -> None:
    with smelt.open(packed) as ours, safe_open(plain, "pt") as theirs:
        with pytest.raises(Exception) as expected:
            theirs.get_slice("matrix")[index]
        with pytest.raises((IndexError, ValueError, TypeError)) as found:
            ours.get_slice("matrix")[index]
        assert isinstance(found.value, type(expected.value)) or isinstance(index, str)


def test_the_interface_of_safe_open(plain: Path, packed: Path) -> None:
    with smelt.open(packed) as ours, safe_open(plain, "pt") as theirs:
        assert ours.keys() == theirs.keys() and ours.metadata() == theirs.metadata() == {"format": "pt"}
        assert ours.offset_keys() == theirs.offset_keys() == ours.names()
        for name in ours.keys():  # noqa: SIM118  it is no mapping
            a, b = ours.get_tensor(name), theirs.get_tensor(name)
            assert a.dtype == b.dtype and torch.equal(a, b)
        for call in (ours.get_tensor, ours.get_slice):
            with pytest.raises(FileError, match="no tensor 'matrx'; did you mean 'matrix'"):
                call("matrx")


def test_closed(packed: Path) -> None:
    with smelt.open(packed) as file:
        part = file.get_slice("matrix")
    for read in (lambda: file.get_tensor("matrix"), lambda: file.get_tensor("scalar"), lambda: part[0]):
        with pytest.raises(FileError, match="it is closed"):
            read()


def test_numpy(plain: Path, packed: Path) -> None:
    for framework in ("np", "numpy"):
        with smelt.open(packed, framework) as ours, safe_open(plain, framework) as theirs:
            for name in ("matrix", "mask", "complex", "scalar", "empty", "b3"):
                a, b = ours.get_tensor(name), theirs.get_tensor(name)
                assert isinstance(a, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
            assert np.array_equal(ours.get_slice("matrix")[3:5, 1], theirs.get_slice("matrix")[3:5, 1])
            with pytest.raises(FileError, match=r"NumPy has no torch.bfloat16; open it with framework='pt'"):
                ours.get_tensor("half")


def test_plain_files_are_opened_by_safetensors(plain: Path) -> None:
    with smelt.open(plain) as file:
        assert type(file).__name__ == "safe_open" and torch.equal(file.get_tensor("b1"), tensors()["b1"])


def test_the_file_of_a_model(tmp_path: Path) -> None:
    model = compressed(tmp_path / "net.smelt")
    with smelt.open(tmp_path / "net.smelt") as file:
        assert (file.keys(), file.offset_keys(), file.metadata(), file.packed) == (["b", "w"], ["w", "b"], None, False)
        assert str(file.encoded("w")) == "affine" and file.stored("b") == "entropy" and file.edits == []
        for name, tensor in (("w", model.w), ("b", model.b)):
            assert torch.equal(file.get_tensor(name), tensor)
            part = file.get_slice(name)
            assert part.get_shape() == list(tensor.shape) and part.get_dtype() == "F32"
            assert torch.equal(part[3:9, 1], tensor[3:9, 1]) and torch.equal(part[..., -1], tensor[..., -1])
        with pytest.raises(FileError, match="no packed checkpoint"):
            _ = file.origin
    found = smelt.load_file(tmp_path / "net.smelt")
    assert all(torch.equal(found[n], getattr(model, n)) for n in ("w", "b"))


def test_only_the_chunks_that_are_wanted_are_decoded(tmp_path: Path) -> None:
    x = torch.randn(3 * 1024, 1024).bfloat16()
    save_file({"x": x}, tmp_path / "x.safetensors")
    smelt.pack(tmp_path / "x.safetensors")
    path = tmp_path / "x.smelt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the second of three chunks
    path.write_bytes(data)
    with smelt.open(path) as file:
        assert torch.equal(file.get_slice("x")[:1024], x[:1024]) and torch.equal(file.get_slice("x")[-7:, 3], x[-7:, 3])
        assert torch.equal(file.get_slice("x")[2048], x[2048])
        for index in (1024, slice(1000, 1025), ...):
            with pytest.raises(FileError, match="'x' cannot be decoded"):
                file.get_slice("x")[index]


def test_what_cannot_be_opened(tmp_path: Path, plain: Path, packed: Path) -> None:
    (tmp_path / "text").write_text("nothing of the kind")
    (tmp_path / "text.smelt").write_text("nothing of the kind")
    for call in (smelt.open, smelt.load_file):
        with pytest.raises(FileError, match="no such file"):
            call(tmp_path / "no")
        with pytest.raises(FileError, match="is a folder"):
            call(tmp_path)
        with pytest.raises(FileError, match=r"neither a \.smelt nor a \.safetensors file"):
            call(tmp_path / "text")
        with pytest.raises(FileError, match=r"no \.smelt file"):
            call(tmp_path / "text.smelt")
        for path in (plain, packed):
            with pytest.raises(ModelError, match="no device 'nowhere'"):
                call(path, device="nowhere")
            with pytest.raises(ModelError, match="'cuda:77' cannot be used here"):
                call(path, device="cuda:77")
    for path in (plain, packed):
        with pytest.raises(ModelError, match="framework 'jax2'"):
            smelt.open(path, "jax2")


def test_load_file(plain: Path, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(packed.read_bytes())
    expected = load_file(plain)
    for path in (plain, copy):
        found = smelt.load_file(path, threads=2)
        assert found.keys() == expected.keys()
        if path == copy:
            assert list(found) == File(packed).names()
            copy.write_bytes(bytes(copy.stat().st_size))  # they have memory of their own
        assert all(torch.equal(found[k], x) and found[k].dtype == x.dtype for k, x in expected.items())
        assert not any(x.requires_grad for x in found.values())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.norm = nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "both"])
def test_a_packed_checkpoint_is_loaded_into_a_module(tmp_path: Path, name: str) -> None:
    model = Tied()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if name != "both":
        del state["head.weight" if name == "embed.weight" else "embed.weight"]
    save_file(state, tmp_path / "x.safetensors")
    smelt.pack(tmp_path / "x.safetensors")
    path = tmp_path / "x.smelt"
    back = smelt.load(path, into=Tied())
    assert back.head.weight is back.embed.weight and not back.training
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))
    assert not store_of(back).entries
    assert smelt.save(back, tmp_path / "y.smelt") < 1.1 * path.stat().st_size
    message = r"a packed checkpoint .* into=.* smelt.load_file .*smelt unpack"
    with pytest.raises(FileError, match=message):
        smelt.load(path)
    with pytest.raises(FileError, match=r"does not fit the model: it lacks 1 tensor\(s\) \(w\)"):
        smelt.load(path, into=Holder({"w": torch.zeros(3)}))


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in Tied().state_dict().items()}
    state["head.weight"] += 1
    save_file(state, tmp_path / "x.safetensors")
    smelt.pack(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"embed.weight and head.weight are tied there, and differ"):
        smelt.load(tmp_path / "x.smelt", into=Tied())
