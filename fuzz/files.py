"""files.py [--count N] [--seed S] [--first I]: damaged and forged files through every way of reading them.

Small valid files are changed: bits, bytes, their length; and, with all checksums put right again, what their meta
says, the bytes of their leaves, and their entropy streams.  Nothing but a SmeltError may come out, in bounded memory
and time.  A changed checkpoint is packed: what smelt.pack takes must come back byte for byte.

File number i depends on the seed and i alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import smelt
from smelt.core.errors import SmeltError
from smelt.core.source import Source
from smelt.core.store import store_of
from smelt.formats import _container as container
from smelt.formats._container import AT_END, HEADER, MAGIC, SMALL, Slot
from smelt.formats._file import File
from smelt.formats._meta import Node
from smelt.formats.smelt import show
from smelt.forms.entropy import Entropy
from smelt.native.stream import CRC, Stream

MEMORY = 1536 << 20  # bytes of address space, beside what there is before the first file
SECONDS = 20  # for a file
WORK = Path(__file__).parent / ".work" / "files"

Build = Callable[[], nn.Module] | None


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 20), nn.BatchNorm1d(20))


RECIPES: dict[str, list[dict[str, Any]]] = {
    "shared": [{"prune.weights": {"ratio": 0.8}}, {"share.kmeans": {}}],
    "shared, Huffman": [{"share.kmeans": {}}, {"code.huffman": {}}],
    "quantized": [
        {"quantize.affine": {"bits": 4, "per": "group", "group": 16}},
        {"quantize.affine": {"bits": 8, "at": "input"}},
    ],
    "smaller": [{"prune.merge": {"ratio": 0.3}}, {"lowrank.svd": {"rank": 4}}],
}


def checkpoint() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(70, 50) * 0.02
    return {
        "embed.weight": x.bfloat16(),
        "half": x[:40].half(),
        "single": x[:30].clone(),
        "double": x[:9].double(),
        "ids": torch.arange(900).reshape(30, 30),
        "mask": x[:50] > 0.01,
        "bytes": torch.randint(0, 256, (700,), dtype=torch.uint8),
        "complex": torch.complex(x[:8], x[8:16]),
        "f8": x.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        **{f"layers.{i}.norm": x[i].bfloat16() for i in range(4)},
    }


def make_files(folder: Path) -> list[tuple[Path, Build]]:
    found: list[tuple[Path, Build]] = []
    for name, steps in RECIPES.items():
        smelt.compress(build(), steps).save(folder / f"{name}.smelt")
        found.append((folder / f"{name}.smelt", build))
    smelt.save(build(), folder / "plain.smelt", tail=())
    smelt.save(build().bfloat16(), folder / "coded.smelt")
    lenet, builder, arguments = smelt.open_model("lenet(size=8, kernel=3, padding=1, hidden=9)")
    store_of(lenet).source = Source(builder=builder, arguments=arguments)
    smelt.save(lenet, folder / "built.smelt")
    save_file(checkpoint(), folder / "checkpoint.safetensors", {"format": "pt"})
    smelt.pack(folder / "checkpoint.safetensors", folder / "packed.smelt")
    return [
        *found,
        (folder / "plain.smelt", build),
        (folder / "coded.smelt", lambda: build().bfloat16()),
        (folder / "built.smelt", None),
        (folder / "packed.smelt", None),
        (folder / "packed.smelt", None),
        (folder / "checkpoint.safetensors", None),
    ]


# ---- files in parts


@dataclass
class Parts:
    """A valid file.  spans: of each leaf that is a stream with checksums, where its chunks are."""

    version: int
    meta: Any
    slots: list[Slot]
    leaves: list[bytes]
    sealed: set[int]
    spans: dict[int, list[tuple[int, int]]]

    def join(self) -> bytes:
        """A file whose checksums are right, whatever its parts."""
        small = b"".join(leaf for slot, leaf in zip(self.slots, self.leaves, strict=True) if slot.nbytes < SMALL)
        large = [i for i, slot in enumerate(self.slots) if slot.nbytes >= SMALL]
        sums = [zlib.crc32(self.leaves[i]) for i in large if i not in self.sealed]
        rest = small + struct.pack(f"<{len(sums)}I", *sums)
        text = json.dumps(self.meta, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
        head = container.deflate(text, len(rest)) + rest
        at_end = bool(self.version & AT_END)
        offsets, end = container.layout(self.slots, 0, HEADER.size + (0 if at_end else len(head)))
        data = bytearray(end)
        for i in large:
            data[offsets[i] : offsets[i] + len(self.leaves[i])] = self.leaves[i]
        if at_end:
            data += head
        else:
            data[HEADER.size : HEADER.size + len(head)] = head
        start = HEADER.pack(MAGIC, self.version, len(head), 0)[:-4]
        data[: HEADER.size] = start + struct.pack("<I", zlib.crc32(head, zlib.crc32(start)))
        return bytes(data)


def take_apart(path: Path) -> Parts | None:
    """None: a checkpoint."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return None
    with File(path) as file:
        reader, offsets = file._reader, file._container._offsets
        leaves = [data[at : at + slot.nbytes] for at, slot in zip(offsets, reader.slots, strict=True)]
        parts = Parts(struct.unpack_from("<H", data, 6)[0], file._meta, reader.slots, leaves, reader.sealed, {})
        counts: Counter[int] = Counter()
        for node in reader.nodes.values():
            if isinstance(node.form, Entropy) and not isinstance(leaf := node.parts["stream"], Node):
                words = node.slot.numel * (2 if node.slot.dtype.is_complex else 1)
                counts[leaf] = max(counts[leaf], node.form.start + words)
        for i, count in counts.items():
            stream = Stream(leaves[i], count)
            if stream.checks:
                parts.spans[i] = list(itertools.pairwise(stream._at))
    assert parts.join() == data or parts.meta == take_apart_meta(parts.join())
    return parts


def take_apart_meta(data: bytes) -> Any:
    with tempfile.NamedTemporaryFile(suffix=".smelt") as file:
        Path(file.name).write_bytes(data)
        return container.Container(file.name).meta


# ---- changes

JUNK: list[Any] = [None, 0, -1, 1, 7, -99, 255, 300, 1 << 16, 1 << 24, 1 << 40, 1 << 62, 0.5, 1e308, True, "", "../x"]
JUNK += ["f64", "u8", "bool", "c64", "bf16", "entropy", "sparse", "bits", "codebook", "affine", "0.weight", "\0"]
JUNK += [[], {}, [1], ["f32"], ["u8", 3, 0], [0, 1 << 40], {"packed": True}, {"gap": 15}, {"start": 5}, {"bits": 3}]
JUNK += [["bits", {}, 9, "packed", 2], ["entropy", {}, [60], "stream", -1], ["keep", "0.weight", 0, "0-9999999"]]
JUNK += [["replace", "0", "chain", {"layers": []}], ["0", "input", "quantize.affine", {}, [], []]]


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (list or mapping, key) below."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    return [place for key in keys for place in ((data, key), *places(data[key]))]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Of the same length."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16]) if found else 0):
        at = rng.randrange(min(len(found), rng.choice([8, 32, 1 << 30])))
        found[at] = rng.choice([rng.randrange(256), found[at] ^ 1 << rng.randrange(8), 0, 255, found[at] + 1 & 255])
    return bytes(found)


def change_raw(data: bytes, rng: random.Random) -> bytes:
    how, at = rng.randrange(6), rng.randrange(len(data))
    size = rng.choice([1, 4, 64, 1000])
    if how == 0:
        return data[:at]
    if how == 1:
        return data + rng.randbytes(size)
    if how == 2:
        return data[:at] + data[at + size :]
    if how == 3:
        return data[:at] + rng.randbytes(size) + data[at:]
    return change_bytes(data, rng)


def change_meta(meta: Any, rng: random.Random) -> None:
    where = places(meta)
    inside, key = rng.choice(where)
    value = inside[key]
    how = rng.randrange(7)
    if how < 2:
        inside[key] = copy.deepcopy(rng.choice(JUNK))
    elif how == 2:
        del inside[key]
    elif how == 3:
        other, place = rng.choice(where)
        inside[key] = copy.deepcopy(other[place])
    elif how == 4 and isinstance(inside, list):
        inside.insert(rng.randrange(len(inside) + 1), copy.deepcopy(value))
    elif isinstance(value, (int, float)):
        inside[key] = rng.choice([value + 1, value - 1, 2 * value, -value, value // 2 if type(value) is int else value])
    elif isinstance(value, str) and value:
        at = rng.randrange(len(value))
        inside[key] = value[:at] + rng.choice(["", "0", "9", "-", ",", "x", "\u0130"]) + value[at + 1 :]
    elif isinstance(inside, dict):
        inside[rng.choice(["", "bits", "start", "tensors", "x"])] = inside.pop(key)


def change_leaf(parts: Parts, rng: random.Random) -> None:
    """Its bytes, or those of a chunk of a stream, or (of bytes alone) how many they are, there and in the meta."""
    i = rng.choice([*range(len(parts.leaves)), *(3 * list(parts.spans))])
    leaf = parts.leaves[i]
    if rng.randrange(4) == 0 and parts.slots[i].dtype == torch.uint8 and len(parts.slots[i].shape) == 1:
        at, size = rng.randrange(len(leaf) + 1), rng.choice([1, 2, 4, 64])
        new = leaf[:at] + leaf[at + size :] if rng.randrange(2) else leaf[:at] + rng.randbytes(size) + leaf[at:]
        for inside, key in places(parts.meta):
            if type(inside[key]) is int and inside[key] == len(leaf):
                inside[key] = len(new)
        parts.slots[i] = Slot(torch.uint8, (len(new),))
        leaf = new
    elif parts.spans.get(i) and rng.randrange(4):
        begin, end = rng.choice(parts.spans[i])
        leaf = leaf[: begin + CRC] + change_bytes(leaf[begin + CRC : end], rng) + leaf[end:]
    else:
        leaf = change_bytes(leaf, rng)
    for begin, end in parts.spans.get(i, ()):
        if begin + CRC <= len(leaf):
            leaf = leaf[:begin] + zlib.crc32(leaf[begin + CRC : end]).to_bytes(CRC, "little") + leaf[begin + CRC :]
    parts.leaves[i] = leaf


def change_checkpoint(data: bytes, rng: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for _ in range(rng.choice([1, 1, 2])):
        change_meta(header, rng)
    text = json.dumps(header).encode(errors="replace") + b" " * rng.choice([0, 0, 1, 7])
    return len(text).to_bytes(8, "little") + text + data[end:]


def changed(whole: bytes, valid: Parts | None, rng: random.Random) -> bytes:
    if rng.randrange(6) == 0:
        return change_raw(whole, rng)
    if valid is None:
        return change_checkpoint(whole, rng)
    parts = copy.copy(valid)
    parts.meta, parts.slots, parts.leaves = copy.deepcopy(valid.meta), valid.slots.copy(), valid.leaves.copy()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.randrange(2):
            change_leaf(parts, rng)
        elif parts.meta:
            change_meta(parts.meta, rng)
    return parts.join()


# ---- reading


class TooLong(BaseException):
    """Nobody takes it for an error of the file."""


def too_long(*_: object) -> None:
    raise TooLong(f"more than {SECONDS} s")


def pack(path: Path) -> str:
    packed, restored = path.with_name("last, packed.smelt"), path.with_name("restored.safetensors")
    try:
        smelt.pack(path, packed, force=True, threads=1)
    except SmeltError:
        return "refused to be packed"
    smelt.unpack(packed, restored, force=True, threads=1)
    assert restored.read_bytes() == path.read_bytes()
    return "packed"


def read(path: Path, build: Build) -> str:
    """How far one gets."""
    refused = 0
    if path.suffix == ".safetensors":
        return pack(path)
    try:
        file = smelt.open(path, threads=1)
    except SmeltError:
        return "refused when opened"
    with file:
        for name in file.offset_keys():
            try:
                file.shape(name), file.dtype(name), file.stored(name), file.forms(name)
                piece = file.get_slice(name)
                shape = piece.get_shape()
                piece[slice(shape[0] // 3, shape[0] // 2 + 1) if shape else ()]
                file.get_tensor(name)
            except SmeltError:
                refused += 1
        ways: list[Callable[[], Any]] = [file.metadata, lambda: file.edits, file.verify, lambda: show(path)]
        ways += [lambda: smelt.load_file(path, threads=1), lambda: smelt.load(path, into=build and build())]
        if file.packed:
            ways.append(lambda: smelt.unpack(path, path.with_name("restored.safetensors"), force=True, threads=1))
        for way in ways:
            try:
                way()
            except SmeltError:
                refused += 1
    return "refused later" if refused else "read"


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def run(count: int, seed: int, first: int) -> int:
    """The number of files that gave something else than a SmeltError."""
    WORK.mkdir(parents=True, exist_ok=True)
    wrong, found, slowest, begin = 0, Counter[str](), 0.0, time.monotonic()
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        files = [(path, path.read_bytes(), take_apart(path), build) for path, build in make_files(Path(folder))]
        expected = {"packed.smelt": "refused later", "checkpoint.safetensors": "packed"}  # it names no model
        for path, _, _, build in files:
            if (how := read(path, build)) != expected.get(path.name, "read"):
                raise SystemExit(f"{path.name}: {how}, although it is valid")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit_memory()
        for i in range(first, first + count):
            rng = random.Random(f"{seed} {i}")
            path, whole, parts, build = rng.choice(files)
            there = Path(folder) / f"last{path.suffix}"  # stays where this process dies
            there.write_bytes(changed(whole, parts, rng))
            start = time.monotonic()
            signal.alarm(SECONDS)
            try:
                found[read(there, build)] += 1
            except (Exception, TooLong):
                wrong += 1
                print(f"file {i}, of {path.name}:", file=sys.stderr)
                traceback.print_exc()
                with suppress(OSError):
                    there.replace(WORK / f"wrong-{seed}-{i}{path.suffix}")
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - start)
            if (i + 1 - first) % 10000 == 0:
                print(f"{i + 1 - first} files, {time.monotonic() - begin:.0f} s, {dict(found)}", flush=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{count} files, {time.monotonic() - begin:.0f} s: {dict(found)}, {wrong} wrong")
    print(f"slowest {slowest:.2f} s; memory grew by {most >> 10} MiB at most")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option, default in (("--count", 1000), ("--seed", 0), ("--first", 0)):
        parser.add_argument(option, type=int, default=default)
    torch.set_num_threads(1)
    sys.exit(run(**vars(parser.parse_args())) > 0)
