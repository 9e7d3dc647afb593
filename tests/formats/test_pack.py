"""Checkpoints are packed and restored byte for byte, in little memory, and an interrupted run goes on."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import save_file

import smelt
from smelt import native
from smelt.core.errors import FileError, OutputError
from smelt.core.progress import Progress
from smelt.formats import _packing
from smelt.formats._container import deflate, header_of, write
from smelt.formats._file import File
from smelt.formats.pack import pack, unpack
from smelt.formats.safetensors import KINDS
from smelt.formats.smelt import show

LOOSE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Info = dict[str, Any]


def forge(path: Path, header: Any, data: bytes = b"", padding: bytes = b"") -> Path:
    """A `.safetensors` file of whatever header (plain data, or bytes)."""
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def info(dtype: str, shape: list[int], begin: int, end: int) -> Info:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def round_trip(source: Path) -> File:
    """Pack and unpack; the packed file."""
    packed, back = source.with_name("packed.smelt"), source.with_name("back.safetensors")
    pack(source, packed, force=True)
    unpack(packed, back, force=True)
    assert back.read_bytes() == source.read_bytes()
    return File(packed)


def small(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes, one of them large."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.norm": 1 + torch.randn(100, generator=generator) / 50 for i in range(9)}
    tensors |= {f"layers.{i}.w": (torch.randn(300, 300, generator=generator) / 50).bfloat16() for i in range(4)}
    tensors["ids"] = torch.arange(1000)
    tensors["noise"] = torch.randint(0, 256, (70000,), generator=generator, dtype=torch.uint8)
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(small(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_checkpoint_comes_back_and_is_smaller(source: Path) -> None:
    done = pack(source)
    packed = source.with_suffix(".smelt")
    assert done.before == source.stat().st_size and done.after == packed.stat().st_size < 0.85 * done.before
    assert done.to_plain()["dtypes"][0]["dtype"] == "BF16" and sum(t.tensors for t in done.dtypes.values()) == 15
    assert sum(t.before for t in done.dtypes.values()) < done.before
    assert sorted(os.listdir(source.parent)) == ["model.safetensors", "model.smelt"]
    with File(packed) as file:
        assert file.origin.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
        assert file.stored("layers.0.w") == "entropy" and file.stored("noise") == "dense"
        assert file.rest_bytes("layers.0.norm") > 0 == file.rest_bytes("layers.1.norm")
        file.verify()
    assert unpack(packed, source.parent / "b.safetensors").before == done.before
    assert (source.parent / "b.safetensors").read_bytes() == source.read_bytes()


def test_packing_repeats_exactly_whatever_the_threads(source: Path) -> None:
    pack(source, source.parent / "a", threads=1)
    pack(source, source.parent / "b", threads=3)
    assert (source.parent / "a").read_bytes() == (source.parent / "b").read_bytes()


@pytest.mark.parametrize("dtype", [*KINDS, "F5_NEW"])
@pytest.mark.parametrize("shape", [[], [0, 3], [8], [6, 100], [70, 2048]], ids=str)
def test_every_dtype(tmp_path: Path, dtype: str, shape: list[int]) -> None:
    count = int(np.prod(shape))
    bits = KINDS.get(dtype, (8, ""))[0]
    if count * bits % 8:
        count, shape = 8, [8]
    generator = np.random.default_rng(len(shape))
    data = generator.integers(0, 256, count * bits // 8, np.uint8)
    data = data & 1 if dtype == "BOOL" else np.minimum(data, generator.integers(0, 256, data.size, np.uint8))
    header = {"a": info(dtype, shape, 0, data.size), "b": info(dtype, shape, data.size, 2 * data.size)}
    with round_trip(forge(tmp_path / "x.safetensors", header, data.tobytes() * 2)) as file:
        file.verify()
        assert {file.origin.header.entries[i].dtype for i in (0, 1)} == {dtype}


def test_truth_values_that_are_none(tmp_path: Path) -> None:
    data = bytes([0, 1, 255, 2]) * 300
    header = {"a": info("BOOL", [600], 0, 600), "b": info("BOOL", [600], 600, 1200)}
    with round_trip(forge(tmp_path / "x.safetensors", header, data)) as file:
        assert file.dtype("a") == torch.uint8


HEADERS = {
    "no tensors": b"{}",
    "only metadata": b'{"__metadata__":{"a":"b\\u00e9 \xc3\xa9"}}',
    "no metadata after all": b'{"__metadata__":null}',
    "spaces": b'{ "a" :\n{"shape":[4 ], "data_offsets":[0,4],\t"dtype":"U8", "note": [1]}}',
    "unsorted": json.dumps(
        {"z": info("U8", [2], 1, 3), "y": info("U8", [0], 3, 3), "b": info("U8", [1], 0, 1), "a": info("I8", [1], 3, 4)}
    ).encode(),
    "a name without letters": json.dumps({"": info("U8", [4], 0, 4)}).encode(),
    "an escaped name": b'{"\\u0061\\"\\n":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "many dimensions": json.dumps({"a": info("U8", [1] * 40 + [4], 0, 4)}).encode(),
    "a huge empty shape": json.dumps({"a": info("U8", [4], 0, 4), "b": info("F32", [2**40, 2**23, 0], 4, 4)}).encode(),
}


@pytest.mark.parametrize("padding", [b"", b" " * 13, b"\n \t\r"], ids=["no padding", "spaces", "other space"])
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_are_kept_as_they_are(tmp_path: Path, header: bytes, padding: bytes) -> None:
    data = b"abcd" if b"dtype" in header else b""
    with round_trip(forge(tmp_path / "x.safetensors", header, data, padding)) as file:
        assert file.origin.header.text.encode() == header + padding
        entries = [(e.begin, e.end) for e in file.origin.header.entries]
        assert entries == sorted(entries) and file.names() == [e.name for e in file.origin.header.entries]


@LOOSE
@given(st.data())
def test_any_checkpoint(tmp_path: Path, data: st.DataObject) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    header, blob = {}, b""
    for i in range(data.draw(st.integers(0, 12))):
        dtype = data.draw(st.sampled_from([k for k, (bits, _) in KINDS.items() if bits % 8 == 0]))
        shape = data.draw(st.lists(st.integers(0, 30), max_size=3))
        size = int(np.prod(shape)) * KINDS[dtype][0] // 8
        top = 2 if dtype == "BOOL" else data.draw(st.sampled_from([2, 17, 256]))
        header[f"t{i}"] = info(dtype, shape, len(blob), len(blob) + size)
        blob += generator.integers(0, top, size, np.uint8).tobytes()
    names = data.draw(st.permutations(list(header)))
    path = forge(tmp_path / "x.safetensors", {name: header[name] for name in names}, blob)
    with round_trip(path) as file, safe_open(path, "pt") as plain:
        assert file.keys() == plain.keys()
        for name in names:
            a, b = file.get_tensor(name), plain.get_tensor(name)
            assert (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)


def bits(x: torch.Tensor) -> bytes:
    return bytes(x.contiguous().reshape(-1).view(torch.uint8).numpy()) if x.numel() else b""


def test_many_small_tensors_share_streams(tmp_path: Path) -> None:
    tensors = {f"{i:03}": torch.randn(500).half() for i in range(200)}
    save_file(tensors, tmp_path / "x.safetensors")
    with round_trip(tmp_path / "x.safetensors") as file:
        assert len(file._reader.slots) == 1
        assert file.nbytes < 0.9 * (tmp_path / "x.safetensors").stat().st_size
        for name in ("000", "131", "199"):
            assert torch.equal(file.get_tensor(name), tensors[name])
            assert torch.equal(file.tensor(name), tensors[name])


def test_tensors_larger_than_what_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packing, "GROUP", 1 << 22)
    tensors = {"a": torch.randn((9 << 20) // 4 + 3), "b": torch.randint(0, 256, (9 << 20,), dtype=torch.uint8)}
    tensors |= {"c": torch.zeros(9 << 20, dtype=torch.int8), "d": torch.randn((9 << 20) // 2).bfloat16()}
    tensors |= {"e": torch.rand(9 << 20) > 0.9, "f": torch.zeros(3 << 20)}
    save_file(tensors, tmp_path / "x.safetensors")
    with round_trip(tmp_path / "x.safetensors") as file:
        assert [file.stored(n) for n in "abcdef"] == ["entropy", "dense", *["entropy"] * 4]
        file.verify()
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


BAD = [
    (b"", b"", "no JSON"),
    (b"[]", b"", "must be a JSON object"),
    (b" {}", b"", "begin with"),
    (b'{"a":', b"", "no JSON"),
    (b"\xff\xfe", b"", "no JSON"),
    (b"{" * 40, b"", "nested deeper"),
    (b'{"a":1}', b"", "'a' is 1; it needs dtype"),
    (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "surrogate"),
    (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"1", "stands twice"),
    ({"__metadata__": {"a": 1}}, b"", "object of texts"),
    ({"__metadata__": []}, b"", "object of texts"),
    ({"a": {"dtype": "U8", "shape": [1]}}, b"1", "needs dtype, shape and data_offsets"),
    ({"a": info(8, [1], 0, 1)}, b"1", "its dtype is 8"),
    ({"a": info("U8", [-1], 0, 1)}, b"1", r"its shape is \[-1\]"),
    ({"a": info("U8", [1.0], 0, 1)}, b"1", r"its shape is \[1.0\]"),
    ({"a": info("U8", [True], 0, 1)}, b"1", "its shape"),
    ({"a": info("U8", 1, 0, 1)}, b"1", "its shape is 1"),
    ({"a": info("U8", [1], 1, 0)}, b"1", "the end must not lie before"),
    ({"a": info("U8", [1], -1, 0)}, b"1", "must be .begin, end."),
    ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1", "must be .begin, end."),
    ({"a": info("F32", [2], 0, 4)}, b"1234", r"F32 \[2\] takes 8 bytes, and its data_offsets \[0, 4\] are 4"),
    ({"a": info("F4", [3], 0, 2)}, b"12", "takes 1.5 bytes"),
    ({"a": info("U8", [2], 0, 2), "b": info("U8", [2], 1, 3)}, b"123", "'b' begins at byte 1 and overlaps"),
    ({"a": info("U8", [1], 0, 1), "b": info("U8", [1], 2, 3)}, b"123", "'b' begins at byte 2 and leaves a hole"),
    ({"a": info("U8", [1], 1, 2)}, b"12", "leaves a hole"),
    ({"a": info("U8", [2], 0, 2)}, b"123", "end at byte 2 by its header, and 3 bytes"),
    ({"a": info("U8", [4], 0, 4)}, b"123", "end at byte 4 by its header, and 3 bytes"),
    ({}, b"1", "end at byte 0 by its header, and 1 bytes"),
    ({"a": info("U8", [2**63, 2**63], 0, 1)}, b"1", "takes 8.5"),
]


@pytest.mark.parametrize(("header", "data", "message"), BAD, ids=[b[2] for b in BAD])
def test_what_could_not_be_restored_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = forge(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FileError, match=message) as caught:
        pack(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("data", [b"", b"abc", struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 1 << 63) + b"{}"])
def test_lengths_of_headers(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(FileError, match="a header of"):
        pack(tmp_path / "x.safetensors")


def test_a_huge_header(tmp_path: Path) -> None:
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # without taking room
    with pytest.raises(FileError, match="a header of 1,073,741,824 bytes where at most 100,000,000 can be"):
        pack(tmp_path / "x.safetensors")


def test_outputs_are_not_replaced(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "model.smelt"
    packed.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        pack(source)
    assert packed.read_bytes() == b"mine"
    pack(source, force=True)
    with pytest.raises(OutputError, match="exists"):
        unpack(packed)
    for path in (source, packed):
        with pytest.raises(OutputError, match="both read and written"):
            (pack if path == source else unpack)(path, path, force=True)
    with pytest.raises(FileError, match=r"a \.smelt file already"):
        pack(packed, tmp_path / "y.smelt")
    with pytest.raises(FileError, match="no such file"):
        pack(tmp_path / "no.safetensors")
    for call in (pack, unpack):
        with pytest.raises(OutputError, match="there is no folder"):
            call(source if call is pack else packed, tmp_path / "no" / "x")


def test_unpacking_what_was_not_packed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no \.smelt file"):
        unpack(source, tmp_path / "y.safetensors")
    smelt.save(torch.nn.Linear(3, 3), tmp_path / "net.smelt")
    with pytest.raises(FileError, match="no packed checkpoint"):
        unpack(tmp_path / "net.smelt")


def test_damage_is_noticed(source: Path, tmp_path: Path) -> None:
    pack(source)
    packed = tmp_path / "model.smelt"
    good = packed.read_bytes()
    for at in range(16, len(good), 15013):
        packed.write_bytes(good[:at] + bytes([good[at] ^ 64]) + good[at + 1 :])
        with pytest.raises(FileError) as caught:
            unpack(packed, tmp_path / "y.safetensors")
        assert "\n" not in str(caught.value) and not (tmp_path / "y.safetensors").exists()
    for size in (0, 10, 16, 1000, len(good) - 1):
        packed.write_bytes(good[:size])
        with pytest.raises(FileError):
            unpack(packed, tmp_path / "y.safetensors")


GOOD = {"header": json.dumps({"a": info("U8", [3], 0, 3)}), "bytes": 8 + 60 + 3, "sha256": "0" * 64}
assert len(GOOD["header"]) == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"more": 1}, "is no origin"),
        ({"bytes": "71"}, "is no origin"),
        ({"bytes": 70}, "end at byte 3 by its header, and 2 bytes"),
        ({"bytes": -1}, "its origin"),
        ({"sha256": "0" * 63 + "G"}, "is no SHA-256"),
        ({"header": "{"}, "no JSON"),
        ({"header": "\ud800"}, "its origin"),
        ({"header": GOOD["header"].replace("a", "b", 1)}, "other tensors than the file"),
        ({"header": GOOD["header"].replace("U8", "F4").replace("[3]", "[6]")}, ""),
    ],
)
def test_forged_origins(tmp_path: Path, change: Info, message: str) -> None:
    path, meta = tmp_path / "x.smelt", {"tensors": ["a", 3], "origin": GOOD | change}
    text = json.dumps(meta).encode()
    head = deflate(text, 3) + b"abc"
    path.write_bytes(header_of(head, 1) + head)
    with pytest.raises(FileError, match=message or "damaged: what it restores has another SHA-256"):
        unpack(path)
    assert os.listdir(tmp_path) == ["x.smelt"]
    if message:
        with pytest.raises(FileError, match=message):
            show(path)


def test_an_origin_must_be_an_object(tmp_path: Path) -> None:
    write(tmp_path / "x.smelt", {"origin": []}, [])
    with pytest.raises(FileError, match=r"'origin': .* has no place"):
        unpack(tmp_path / "x.smelt")


def test_a_wrong_copy_is_not_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packing, "sha256_of", lambda *_: "0" * 64)
    with pytest.raises(OutputError, match="would not restore"):
        pack(source)
    assert os.listdir(source.parent) == ["model.safetensors"]


def test_a_damaged_part_is_not_gone_on_from_for_ever(source: Path) -> None:
    class Stop(Progress):
        def advance(self, done: int, total: int, text: str = "") -> None:
            if text == "reading back":
                raise KeyboardInterrupt

    part = source.with_name("model.smelt.part")
    with pytest.raises(KeyboardInterrupt):
        pack(source, progress=Stop())
    data = bytearray(part.read_bytes())
    data[2000] ^= 64
    part.write_bytes(data)
    with pytest.raises(OutputError, match="would not restore"):
        pack(source)
    assert os.listdir(source.parent) == ["model.safetensors"]
    assert pack(source).resumed == 0


def test_two_at_once(source: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(source.with_name("model.smelt.part.jsonl"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another smelt pack is writing it"):
            pack(source)
    pack(source)


def test_a_source_of_the_name_of_the_part(source: Path, tmp_path: Path) -> None:
    for name in ("x.smelt.part", "x.smelt.part.jsonl"):
        other = Path(shutil.copy(source, tmp_path / name))
        with pytest.raises(OutputError, match="rename it"):
            pack(other, tmp_path / "x.smelt")
        assert other.read_bytes() == source.read_bytes()
        other.unlink()


def test_a_checkpoint_that_changes_meanwhile(source: Path) -> None:
    class Touch(Progress):
        def advance(self, done: int, total: int, text: str = "") -> None:
            os.utime(source, ns=(1, 1))

    with pytest.raises(FileError, match="was changed while it was read"):
        pack(source, progress=Touch())
    assert not source.with_suffix(".smelt").exists()


class Stop(Progress):
    """Interrupts after so many calls."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, done: int, total: int, text: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 3, 5, 8])
def test_an_interrupted_run_goes_on(source: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    pack(source, whole := source.parent / "whole.smelt")
    output = source.with_suffix(".smelt")
    with pytest.raises(KeyboardInterrupt):
        pack(source, progress=Stop(after))
    left = sorted(p.name for p in source.parent.glob("model.smelt*"))
    assert left == ["model.smelt.part", "model.smelt.part.jsonl"]
    coded, encode = [], _packing.encode
    monkeypatch.setattr(_packing, "encode", lambda x, *a, **k: coded.append(x.nbytes) or encode(x, *a, **k))
    done = pack(source)
    assert done.resumed + sum(coded) == data_bytes(source) and bool(done.resumed) == (after > 0)
    assert output.read_bytes() == whole.read_bytes()
    assert not list(source.parent.glob("*.part*"))


def data_bytes(path: Path) -> int:
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("how", ["time", "content", "header", "journal", "cut journal", "cut part", "version"])
def test_what_cannot_be_gone_on_from(source: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(source, progress=Stop(5))
    part, journal = (source.with_name(f"model.smelt.part{end}") for end in ("", ".jsonl"))
    stat = source.stat()
    if how == "time":
        os.utime(source, ns=(1, 1))
    elif how in ("content", "header"):
        data = bytearray(source.read_bytes())
        if how == "content":
            data[8 + int.from_bytes(data[:8], "little")] ^= 1
        else:
            data = data.replace(b'"pt"', b'"tp"')
        source.write_bytes(data)
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "journal":
        journal.write_text("[]\nnothing")
    elif how == "cut journal":
        journal.write_text(journal.read_text()[:-9])
    elif how == "cut part":
        os.truncate(part, 20)
    else:
        monkeypatch.setattr(_packing, "__version__", "0")
    done = pack(source)
    assert (done.resumed > 0) == (how == "cut journal")
    unpack(source.with_suffix(".smelt"), source.parent / "y")
    assert (source.parent / "y").read_bytes() == source.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_process(source: Path) -> None:
    code = f"""
        import os, signal
        from smelt.core.progress import Progress
        from smelt.formats.pack import pack
        class Kill(Progress):
            def advance(self, done, total, text=""):
                if done > total / 4:
                    os.kill(os.getpid(), signal.SIGKILL)
        pack({str(source)!r}, progress=Kill())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL and not source.with_suffix(".smelt").exists()
    assert pack(source).resumed > 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint, with a second one in a folder of it."""
    made = tmp_path / "hub" / "model"
    (made / "vae" / "empty").mkdir(parents=True)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file(small(i), made / name, metadata={"format": "pt"})
    save_file(small(3), made / "vae" / "vae.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": names[0], "b": names[1]}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    (made / "config.json").write_text("{}")
    (made / "tokenizer.model").write_bytes(os.urandom(3000))
    (made / "run.sh").write_text("#!/bin/sh\n")
    (made / "run.sh").chmod(0o755)
    smelt.save(torch.nn.Linear(3, 3), made / "net.smelt")
    blob = tmp_path / "hub" / "blob"
    (made / "config.json").rename(blob)
    (made / "config.json").symlink_to(blob)  # as in the cache of the Hugging Face hub
    return made


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed", tmp_path / "back"
    done = pack(folder, packed)
    assert (done.files, done.copied, done.skipped) == (3, 5, 0)
    expected = {n.replace(".safetensors", ".smelt") if n.endswith(".safetensors") else n for n in content(folder)}
    assert set(content(packed)) == expected and os.access(packed / "run.sh", os.X_OK)
    done = unpack(packed, back)
    assert (done.files, done.copied) == (3, 5)
    assert content(back) == content(folder)


def test_a_folder_goes_on(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        pack(folder, packed, progress=Stop(28))
    assert len(list(packed.rglob("*.part"))) == 1
    with pytest.raises(FileError, match="is half a packed file"):
        unpack(packed, tmp_path / "early")
    done = pack(folder, packed)
    assert done.skipped == 1 and done.resumed > 0 and done.files == 3
    assert pack(folder, packed).skipped == 3
    (packed / "config.json").write_text("[]")
    with pytest.raises(OutputError, match=r"config\.json' exists"):
        pack(folder, packed)
    save_file(small(7), folder / "vae" / "vae.safetensors")
    with pytest.raises(OutputError, match="exists"):
        pack(folder, packed)
    assert pack(folder, packed, force=True).skipped == 2
    unpack(packed, tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)
    (tmp_path / "back" / "vae" / "vae.safetensors").unlink()
    assert unpack(packed, tmp_path / "back").skipped == 2
    assert content(tmp_path / "back") == content(folder)


def test_folders_that_cannot_be_packed(folder: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, output: Path | None = tmp_path / "p") -> None:
        with pytest.raises(error, match=match) as caught:
            pack(folder, output)
        assert "\n" not in str(caught.value) and not (tmp_path / "p").exists()

    refused(OutputError, "-o FOLDER", None)
    for output in (folder, folder / "vae" / "p", folder.parent):
        refused(OutputError, "within each other", output)
    refused(OutputError, "is no folder", folder.parent / "blob")
    refused(OutputError, "there is no folder", tmp_path / "no" / "p")
    (folder / "vae" / "vae.smelt").write_bytes(b"other")
    refused(OutputError, "would both become")
    (folder / "vae" / "vae.smelt").unlink()
    shutil.copy(folder / "vae" / "vae.safetensors", tmp_path / "one.safetensors")
    pack(tmp_path / "one.safetensors", folder / "one.smelt")
    refused(FileError, "one.smelt' is packed already")
    (folder / "one.smelt").unlink()
    (folder / "link").symlink_to(tmp_path)
    refused(FileError, "a link to a folder")
    (folder / "link").unlink()
    (folder / "link").symlink_to(tmp_path / "nothing")
    refused(FileError, "a link to nothing")
    (folder / "link").unlink()
    (folder / "z.safetensors").write_bytes(b"short")
    with pytest.raises(FileError, match=r"z\.safetensors"):
        pack(folder, tmp_path / "q")
    (tmp_path / "void").mkdir()
    with pytest.raises(FileError, match=r"holds no \.safetensors file"):
        pack(tmp_path / "void", tmp_path / "p")
    with pytest.raises(FileError, match=r"holds no packed \.smelt file"):
        unpack(tmp_path / "void", tmp_path / "p")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
@pytest.mark.skipif(native.library() is None, reason="NumPy takes more memory for a chunk")
def test_peak_memory(tmp_path: Path) -> None:
    """It does not depend on the largest tensor, whether that shrinks or not; here it is about as large."""
    large = 96 << 20
    words = np.random.default_rng(0).integers(0, 1 << 16, large // 2, np.uint16)
    words &= 0x81FF
    words |= 0x3C00
    noise = np.random.default_rng(1).integers(0, 256, large, np.uint8)
    header = {"a": info("BF16", [large // 2], 0, large), "b": info("U8", [large], large, 2 * large)}
    forge(tmp_path / "large.safetensors", header, words.tobytes() + noise.tobytes())
    forge(tmp_path / "tiny.safetensors", {"a": info("BF16", [8], 0, 16)}, bytes(16))
    code = """
        import smelt, sys
        for name in ("tiny", "large"):
            if sys.argv[1] == "pack":
                smelt.pack(f"{name}.safetensors", threads=2)
            else:
                smelt.unpack(f"{name}.smelt", f"{name}.back", threads=2)
            lines = open("/proc/self/status").read().splitlines()
            print(int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10)
    """
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    for verb in ("pack", "unpack"):
        call = [sys.executable, "-c", textwrap.dedent(code), verb]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True, env=env)
        least, most = map(int, done.stdout.split())
        assert most - least < 1.3 * large, f"{verb} takes {(most - least) / large:.2f} times the largest tensor"
    assert (tmp_path / "large.back").read_bytes() == (tmp_path / "large.safetensors").read_bytes()
