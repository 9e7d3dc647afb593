"""Damaged, foreign and forged files: one FileError, or the same content."""

import copy
import json
import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from smelt.core import shelf
from smelt.core.edit import Keep, Set
from smelt.core.encoded import Encoded
from smelt.core.errors import FileError
from smelt.core.method import State, make
from smelt.core.source import Source
from smelt.core.store import Activation, apply_edits, store, store_of
from smelt.core.target import targets
from smelt.formats import _container as container
from smelt.formats._container import HEADER, MAGIC, SMALL, Container, Slot, write
from smelt.formats._file import File
from smelt.formats.smelt import load, save, show
from smelt.forms.affine import Affine
from smelt.forms.codebook import Codebook
from smelt.forms.sparse import Sparse
from tests.formats import holder
from tests.formats.holder import Holder

TAIL = (make("code.huffman"), make("code.bits"))
Change = Callable[[Any], None]


@pytest.fixture(autouse=True)
def shelves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_registered", {})
    shelf.register("forms", "tiny", "tests.formats.tiny")
    shelf.register("models", "holder", "tests.formats.holder")
    shelf.register("methods", "test.act", "tests.formats.act")


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 9), nn.BatchNorm1d(9))


def compressed() -> nn.Module:
    """A model whose file has everything a file can have, leaves in the head and behind it."""
    model = build()
    store_of(model).source = Source(builder="tests.formats.test_hostile:build")
    apply_edits(model, [Keep("1.weight", 1, tuple(range(30))), Set("0", "out_features", 30)], "1: test")
    book = torch.linspace(-0.3, 0.3, 16)
    for target in targets(model)[:4]:
        x = target.tensor.detach()
        indices = (x[..., None] - book).abs().argmin(-1).to(torch.uint8)
        tree = Encoded(Codebook(), {"codebook": book, "indices": indices}, x.shape, x.dtype)
        if target.name == "0.weight":
            tree = Encoded(Sparse(), {"mask": x.abs() > 0.1, "values": tree}, x.shape, x.dtype)
        if target.name == "1.bias":
            codes = (x * 100).to(torch.int8)
            tree = Encoded(Affine(), {"codes": codes, "scale": torch.tensor(0.01)}, x.shape, x.dtype)
        store(model, target, tree, "2: test")
    one = Activation("0", "input", make("test.act", {"bits": 3}), State(scale=torch.ones(100), learn=("scale",)))
    one.install(model)
    store_of(model).activations.append(one)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "net.smelt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf, "_registered", {"methods": {"test.act": "tests.formats.act"}})
        save(compressed(), path, tail=TAIL, recipe={"steps": [{"code.bits": {}}]}, report=[[0, "bytes", 3]])
    return path


def content(path: Path) -> Any:
    """All that a file says, through every way of reading it."""
    model = load(path, into=build())
    held = store_of(model)
    shown = {k: v for k, v in show(path).items() if k != "file"}
    with File(path) as file:
        file.verify()
        dense = {name: plain(file.tensor(name)) for name in file.names()}
    states = [(a.path, a.at, a.codec, {k: plain(v) for k, v in a.state.state_dict().items()}) for a in held.activations]
    return shown, dense, {t.name: plain(t.tensor) for t in targets(model)}, held.edits, states


def plain(x: Tensor) -> Any:
    return x.dtype, x.shape, x.tolist()


def outcome(path: Path) -> Any:
    """The content, or the one line of a FileError."""
    try:
        return content(path)
    except FileError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return str(error)


def test_every_truncation_is_noticed(good: Path, tmp_path: Path) -> None:
    data, path = good.read_bytes(), tmp_path / "x"
    for more in (b"\0", data):
        path.write_bytes(data + more)
        with pytest.raises(FileError, match="damaged"):
            File(path)
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        with pytest.raises(FileError, match=r"damaged|no \.smelt file"):
            File(path)


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1 << bit]))


def test_every_flipped_bit_of_the_head_is_noticed(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(good.read_bytes())
    for at in range(HEADER.size + HEADER.unpack_from(good.read_bytes())[2]):
        for bit in range(8):
            flip(path, at, bit)
            with pytest.raises(FileError, match=r"damaged|no \.smelt file|newer"):
                File(path)
            flip(path, at, bit)
    assert path.read_bytes() == good.read_bytes()


def test_flipped_bits_of_leaves_are_noticed(good: Path, tmp_path: Path) -> None:
    data, path = good.read_bytes(), tmp_path / "x"
    path.write_bytes(data)
    expected, start = content(good), HEADER.size + HEADER.unpack_from(data)[2]
    for at in range(start, len(data), 41):
        flip(path, at, at % 8)
        assert "checksum of leaf" in outcome(path)
        flip(path, at, at % 8)
    assert outcome(path) == expected


def test_foreign_and_newer_files(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (b"", b"PK\x03\x04" + bytes(100), b"{}", bytes(16), MAGIC[1:] + bytes(30)):
        path.write_bytes(data)
        with pytest.raises(FileError, match=r"x': no \.smelt file"):
            File(path)
    data = bytearray(good.read_bytes())
    data[6:8] = struct.pack("<H", 2)
    path.write_bytes(data)
    with pytest.raises(FileError, match="written by a newer smelt: format version 2, this one reads up to 1"):
        load(path)
    for missing in (tmp_path / "no", tmp_path):
        with pytest.raises(FileError, match="no such file"):
            File(missing)


def forge(path: Path, meta: Any, rest: bytes, behind: bytes = b"") -> Path:
    """A file with a right checksum and whatever meta."""
    text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    head = container.deflate(text, len(rest)) + rest
    start = HEADER.pack(MAGIC, 1, len(head), 0)[:-4]
    path.write_bytes(start + struct.pack("<I", zlib.crc32(head, zlib.crc32(start))) + head + behind)
    return path


def parts(path: Path) -> tuple[Any, bytes, bytes]:
    """(meta, the rest of the head, what is behind it)"""
    data, opened = path.read_bytes(), Container(path)
    return opened.meta, data[opened._small_at : opened._large_at], data[opened._large_at :]


JUNK = [None, 0, -1, 1, 7, -99, 300, 1 << 40, 1 << 62, 0.5, True, "", "x", "f64", "u8", "entropy", "sparse", "../x"]
JUNK += [[], {}, [1], ["f32"], ["u8", 3, 0], {"packed": True}, {"gap": 15}, {"bits": {"ramp": [0, 1]}}]
JUNK += [["tiny", {}, None], ["bits", {}, 9, "packed", 2], ["keep", "0.weight", 0, "0-16777215"]]
JUNK += [["replace", "0", "chain", {"layers": []}]]


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (list or mapping, key) below."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    return [place for key in keys for place in ((data, key), *places(data[key]))]


@settings(max_examples=350, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_forged_meta(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    meta, rest, behind = parts(good)
    for _ in range(data.draw(st.integers(1, 3))):
        where = places(meta)
        inside, key = where[data.draw(st.integers(0, len(where) - 1))]
        how = data.draw(st.sampled_from(["junk", "junk", "junk", "drop", "twin", "exchange"]))
        if how == "junk":
            inside[key] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
        elif how == "drop":
            del inside[key]
        else:
            other, place = where[data.draw(st.integers(0, len(where) - 1))]
            inside[key] = copy.deepcopy(other[place]) if how == "twin" else inside[key]
        if len(json.dumps(meta)) > 20000:
            return
    outcome(forge(tmp_path / "x", meta, rest, behind))


def only(tmp_path: Path, node: Any, leaves: list[Tensor], **meta: Any) -> Path:
    path = tmp_path / "x"
    write(path, {"tensors": ["w", node], **meta}, leaves, force=True)
    return path


BYTES = torch.zeros(3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("node", "leaves", "message"),
    [
        (["nothing", {}, [3], "x", 3], [BYTES], "no form 'nothing'"),
        (["tiny", {}, [3], "x", 3], [BYTES], "form 'tiny' is of version '1', this smelt has version 2"),
        (["entropy@7", {}, [3], "stream", 3], [BYTES], "form 'entropy' is of version '7', this smelt has version 1"),
        (["tiny@2", {"factr": 1}, [3], "x", 3], [BYTES], "no setting 'factr'; did you mean 'factor'"),
        (["tiny@2", {"factor": "1"}, [3], "x", 3], [BYTES], "factor"),
        (["tiny@2", {"factor": {"ramp": [0, 1]}}, [3], "x", 3], [BYTES], "a setting that moves"),
        (["tiny@2", {"fail": "check"}, [3], "x", 3], [BYTES], "form 'tiny': KeyError: 'x'"),
        (["tiny@2", {"fail": "awake"}, [3], "x", 3], [BYTES], "'w' cannot be decoded: RuntimeError: no"),
        (["tiny@2", {"fail": "shape"}, [4], "x", 3], [BYTES], r"it awakens as \[3\]"),
        (["tiny@2", {"fail": "decode"}, [3], "x", 3], [BYTES], "'w' cannot be decoded: IndexError: out of"),
        (["tiny@2", {}, [4], "x", 3], [BYTES], "'w' cannot be decoded: RuntimeError"),
        (["tiny@2", {}, [3], "x", 3, "x", 3], [BYTES, BYTES], "'x' is no name or stands twice"),
        (["tiny@2", {}, [3], "x"], [], "no list of names and parts"),
        (["tiny@2", {}], [], "is no node"),
        (["tiny@2", {}, [1 << 24, 4], "x", 3], [BYTES], "implausibly large for this file"),
        (["tiny@2", {}, [1 << 40, 1 << 40], "x", 3], [BYTES], "implausibly large"),
        ([0, 1 << 62], [], "implausibly large"),
        (["sparse", {"packed": True, "gap": 255}, [1 << 20], "positions", 3, "values", [0]], [BYTES], "do not cover"),
        ("f33", [], "unknown dtype 'f33'"),
        ([3, -1], [], "is no shape"),
        ([True], [], "is no shape"),
        ({}, [], "is no type"),
        (0.5, [], "is no type"),
        (-1, [], "a reference to leaf 0, which is not yet there"),
        (["i32", 3], [BYTES], "its leaves would end at byte"),
    ],
)
def test_claims_are_judged(tmp_path: Path, node: Any, leaves: list[Tensor], message: str) -> None:
    with pytest.raises(FileError, match=message), File(only(tmp_path, node, leaves)) as file:
        file.tensor("w")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([], "is no mapping"),
        ({"tensor": []}, "'tensor': .* has no place"),
        ({"tensors": {}}, "'tensors': .* has no place"),
        ({"builder": 3}, "'builder': 3 has no place"),
        ({"tensors": ["a", 0, "a", 0]}, "'a' is no name or stands twice"),
        ({"tensors": [3, 0]}, "3 is no name"),
        ({"tensors": ["a"]}, "no list of names"),
        ({"activations": [["0", "input", "x", {}, []]]}, "is no activation"),
        ({"activations": [["0", "input", "x", {}, ["a", ["tiny@2", {}, None]], []]]}, "is no tensor of a state"),
        (b'{"builder":"a","builder":"b"}', "a key stands twice"),
        (b'{"report":' + b"[" * 32 + b"]" * 32 + b"}", "nested deeper than 32"),
        (b"[" * 60000, "nested deeper"),
        (b'{"report":' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"report":"\xff"}', "utf-8"),
        (b'{"report":"' + b'\\"' * 30000, "damaged"),
        (b"", "damaged"),
    ],
)
def test_meta_is_judged(tmp_path: Path, meta: Any, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(FileError, match=message):
        File(forge(tmp_path / "x", meta, b""))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"arguments": {"shape": [1 << 20, 1 << 20]}}, r"w is \[3\] .* in the file and \[1048576, 1048576\]"),
        ({"arguments": {"shape": "abc"}}, "builder 'holder'"),
        ({"arguments": {"shap": [3]}}, "no argument 'shap'; did you mean 'shape'"),
        ({"builder": "lenett", "arguments": {}}, "'lenett', which is not part of smelt"),
        ({"builder": "os:system", "arguments": {"command": "true"}}, "not part of smelt"),
        ({"edits": [3]}, "no edit"),
        ({"edits": [["keep", "w", 0, 5]]}, "no edit"),
        ({"edits": [["keep", "w", 0, "0-16777215"]]}, "too many positions"),
        ({"edits": [["keep", "w", 0, "0-2"]] * 30000}, "too many positions"),
        ({"edits": [["keep", "w", "0", "0"]]}, "edits do not fit"),
        ({"edits": [["keep", "v", 0, "0"]]}, "no tensor 'v'"),
        ({"edits": [["set", "", "__class__", "x"]]}, "edit set"),
        ({"edits": [["replace", "", "os", {}]]}, "no model 'os'"),
        ({"activations": [["0", "input", "test.act", {}, [], []]]}, "edits do not fit|no attribute"),
        ({"activations": [["", "output", "test.act", {}, [], []]]}, "does not act at 'output'"),
        ({"activations": [["", "input", "code.bits", {}, [], []]]}, "does not act at 'input'"),
        ({"activations": [["", "input", "test.no", {}, [], []]]}, "no method 'test.no'"),
        ({"activations": [["", "input", "test.act", {"bits": {"ramp": [1, 2]}}, [], []]]}, "a setting that moves"),
        ({"activations": [["", "input", "test.act", {}, ["forward", -1], []]]}, "activation of ''"),
    ],
)
def test_loading_is_judged(tmp_path: Path, meta: Any, message: str) -> None:
    path = only(tmp_path, [3], [torch.zeros(3)], **{"builder": "holder", "arguments": {"shape": [3]}, **meta})
    tracemalloc.start()
    with pytest.raises(FileError, match=message) as caught:
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_large_buffers_of_a_forged_builder_are_refused(tmp_path: Path) -> None:
    model = holder.build()
    store_of(model).source = Source(builder="holder", arguments={"table": 1 << 40})
    save(model, tmp_path / "x")
    with pytest.raises(FileError, match="implausibly large buffers"):
        load(tmp_path / "x")


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    c = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, container.WORDS)
    head = c.compress(b'{"report":"' + b"x" * (1 << 26)) + c.flush()
    start = HEADER.pack(MAGIC, 1, len(head), 0)[:-4]
    path = tmp_path / "x"
    path.write_bytes(start + struct.pack("<I", zlib.crc32(head, zlib.crc32(start))) + head)
    tracemalloc.start()
    with pytest.raises(FileError, match="implausibly large"):
        File(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_what_packs_too_well_can_still_be_read(tmp_path: Path) -> None:
    report = ["x" * 2_000_000]
    save(Holder({"w": torch.zeros(3)}), tmp_path / "x", report=report)
    assert File(tmp_path / "x").report == report


def test_the_deepest_meta_that_is_written_can_be_read(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(31):
        deep = [deep]
    save(Holder({}), tmp_path / "x", report=deep)
    assert File(tmp_path / "x").report == deep
    with pytest.raises(ValueError, match="nested deeper than 32"):
        save(Holder({}), tmp_path / "y", report=[deep])


def test_truth_values_are_checked(tmp_path: Path) -> None:
    model = Holder({"w": torch.ones(300, dtype=torch.bool)})
    save(model, path := tmp_path / "x", tail=())
    meta, rest, _ = parts(path)
    forged = bytes([2]) * 300
    rest = rest[:-4] + struct.pack("<I", zlib.crc32(forged))
    with pytest.raises(FileError, match="truth values"), File(forge(path, meta, rest, forged)) as file:
        file.tensor("w")


def test_layout() -> None:
    slots = [
        Slot(torch.uint8, (5000,)),
        Slot(torch.float32, (3,)),
        Slot(torch.int8, (50, 100)),
        Slot(torch.int8, (300,)),
    ]
    assert container.layout(slots, 100, 200) == ([200, 100, 5248, 10248], 10548)
    assert SMALL == 256
