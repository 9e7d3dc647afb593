"""Writing: complete or not at all, never over something by accident, the same bytes every time."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from smelt.core import shelf
from smelt.core.encoded import Encoded
from smelt.core.errors import ModelError, OutputError
from smelt.core.method import make
from smelt.core.store import Entry, store, store_of
from smelt.core.target import targets
from smelt.formats._file import File
from smelt.formats.smelt import save
from smelt.forms.affine import Affine
from tests.formats.holder import Holder
from tests.formats.tiny import Tiny


def compressed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3))
    for target in targets(model):
        x = target.tensor.detach()
        codes = (x * 100).to(torch.int8)
        store(
            model, target, Encoded(Affine(), {"codes": codes, "scale": torch.tensor(0.01)}, x.shape, x.dtype), "1: test"
        )
    return model


@pytest.mark.parametrize("place", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("before", [False, True])
def test_failing_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, problem: BaseException, before: bool
) -> None:
    path = tmp_path / "x"
    if before:
        path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(place, fail)
    expected = KeyboardInterrupt if isinstance(problem, KeyboardInterrupt) else OutputError
    message = "no space is left" if getattr(problem, "errno", 0) == errno.ENOSPC else None
    with pytest.raises(expected, match=message):
        save(compressed(), path, force=True)
    assert os.listdir(tmp_path) == (["x"] if before else [])
    assert not before or path.read_bytes() == b"old"


def test_no_space_is_found_out_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 9))
    with pytest.raises(OutputError, match=r"needs [0-9]+ bytes, and 9 are free"):
        save(compressed(), tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        save(compressed(), tmp_path / name, tail=[make("code.huffman")], recipe={"steps": []}, report=[[0, "bytes", 3]])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_cannot_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Holder({"w": torch.zeros(3)})
    with pytest.raises(ModelError, match=r"recipe\.a\[1\]: .* is no plain data"):
        save(model, tmp_path / "a", recipe={"a": [1, object()]})
    with pytest.raises(ModelError, match=r"w \[3\] is .* on meta"):
        save(Holder({"w": torch.zeros(3, device="meta")}), tmp_path / "a")
    store_of(model).entries["w"] = Entry(Encoded(Tiny(), {"x": torch.zeros(3)}, model.w.shape, model.w.dtype), ("1",))
    monkeypatch.setattr(shelf, "_registered", {})
    with pytest.raises(ModelError, match="Tiny is not on the shelf 'forms' as 'tiny'"):
        save(model, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_existing_and_unwritable_paths(tmp_path: Path) -> None:
    model, path = Holder({"w": torch.zeros(3)}), tmp_path / "a"
    save(model, path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists; to replace it pass force=True or --force"):
        save(model, path)
    assert path.read_bytes() == before
    model.w.data += 1
    save(model, path, force=True)
    assert path.read_bytes() != before
    for bad in (tmp_path, tmp_path / "no" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError):
            save(model, bad, force=True)
    assert os.listdir(tmp_path) == ["a"]


def test_an_open_file_may_be_replaced(tmp_path: Path) -> None:
    x = torch.randn(100, 100)
    save(Holder({"w": x}), path := tmp_path / "a", tail=())
    with File(path) as file:
        w = file.tensor("w")
        save(Holder({"w": torch.zeros(1)}), path, force=True)
        assert torch.equal(w, x) and torch.equal(file.tensor("w"), x)
