"""docs/format.md says enough: a reader in plain Python, written from it alone."""

import json
import math
import struct
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smelt.core.encoded import Encoded
from smelt.core.method import make
from smelt.core.source import Source
from smelt.core.store import store, store_of
from smelt.core.target import targets
from smelt.formats._container import DTYPES
from smelt.formats.smelt import save
from smelt.forms.affine import Affine
from smelt.forms.codebook import Codebook
from smelt.forms.sparse import Sparse

DOCUMENT = (Path(__file__).parents[2] / "docs/format.md").read_text()
BLOCKS = [block.split("\n", 1)[1].rstrip("\n") for block in DOCUMENT.split("```")[1::2]]
DICTIONARY = BLOCKS[-1].replace("\n", "").encode()

STRUCT = {"bool": "?", "f16": "e", "f32": "f", "f64": "d"} | {
    f"{sign}{8 * 2**i}": letter for sign, letters in (("u", "BHIQ"), ("i", "bhiq")) for i, letter in enumerate(letters)
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "affine": {"axis": None, "group": 0, "bits": 8, "symmetric": True},
    "sparse": {"packed": False, "gap": 0, "columns": False},
    "bits": {"bits": 1, "offset": 0},
}
IN_LAYOUT = {"affine": ["codes"], "codebook": ["indices"], "sparse": ["mask", "values"]}
Leaf = list[Any]


def read(data: bytes) -> tuple[Any, dict[str, Leaf]]:
    """(the meta, the elements of every tensor)"""
    magic, version, length, crc = struct.unpack("<6sHII", data[:16])
    head = data[16 : 16 + length]
    assert (magic, version, crc) == (b"\x8bsmelt", 1, zlib.crc32(data[:12] + head))
    inflate = zlib.decompressobj(-15, zdict=DICTIONARY)
    meta = json.loads(inflate.decompress(head))
    types: list[tuple[str, list[int]]] = []
    trees = {name: parse(part, ("f32", []), types) for name, part in pairs(meta["tensors"])}
    sizes = [math.prod(shape) * struct.calcsize(STRUCT[dtype]) for dtype, shape in types]
    rest, at, leaves = inflate.unused_data, 16 + length, []
    sums = struct.unpack(f"<{sum(size >= 256 for size in sizes)}I", rest[sum(size for size in sizes if size < 256) :])
    check = iter(sums)
    for (dtype, shape), size in zip(types, sizes, strict=True):
        if size < 256:
            raw, rest = rest[:size], rest[size:]
        else:
            at += -at % 64 if size >= 4096 and not (dtype == "u8" and len(shape) == 1) else 0
            raw, at = data[at : at + size], at + size
            assert zlib.crc32(raw) == next(check)
        leaves.append(list(struct.unpack(f"<{math.prod(shape)}{STRUCT[dtype]}", raw)))
    assert at == len(data)
    return meta, {name: dense(tree, leaves) for name, tree in trees.items()}


def pairs(items: list[Any]) -> list[tuple[str, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def parse(part: Any, above: tuple[str, list[int]], types: list[tuple[str, list[int]]]) -> dict[str, Any]:
    if isinstance(part, list) and len(part) > 1 and isinstance(part[1], dict):
        form, settings, kind, *rest = part
        own = relative(kind, above)
        parts = {name: parse(inner, own, types) for name, inner in pairs(rest)}
        return {"form": form, **DEFAULTS.get(form, {}), **settings, "type": own, "parts": parts}
    if isinstance(part, int) and part < 0:
        return {"form": "leaf", "leaf": -1 - part}
    types.append(relative(part, above))
    return {"form": "leaf", "leaf": len(types) - 1}


def relative(kind: Any, above: tuple[str, list[int]]) -> tuple[str, list[int]]:
    if kind is None:
        return above
    if isinstance(kind, int):
        return "u8", [kind]
    if isinstance(kind, str):
        return kind, above[1]
    return (kind[0], kind[1:]) if kind and isinstance(kind[0], str) else (above[0], kind)


def dense(node: dict[str, Any], leaves: list[Leaf]) -> Leaf:
    """The elements of a tree; each form as the document has it."""
    if node["form"] == "leaf":
        return leaves[node["leaf"]]
    if node["form"] == "sparse" and node["packed"]:
        node = unpacked(node, leaves)
    if node["form"] == "flat":
        return node["elements"]
    (dtype, shape), parts = node["type"], {name: dense(part, leaves) for name, part in node["parts"].items()}
    count = math.prod(shape)
    if node["form"] == "codebook":
        return [parts["codebook"][i] for i in parts["indices"]]
    if node["form"] == "sparse":
        return [v if m else 0.0 for m, v in zip(parts["mask"], parts["values"], strict=True)]
    if node["form"] == "affine":
        inner = math.prod(shape[(node["axis"] or 0) + 1 :])
        side = [0 if node["axis"] is None else i // inner % shape[node["axis"]] for i in range(count)]
        if node["group"]:
            groups = -(-inner // node["group"])
            side = [i // inner * groups + i % inner // node["group"] for i in range(count)]
        zero = parts.get("zero", [0] * count)
        return [float32((c - zero[s]) * parts["scale"][s]) for c, s in zip(parts["codes"], side, strict=True)]
    if node["form"] == "bits":
        if node["bits"] == 8 * struct.calcsize(STRUCT[dtype]) and dtype != "bool":
            return list(struct.unpack(f"<{count}{STRUCT[dtype]}", bytes(parts["packed"])))
        bits, width = unpack_bits(parts["packed"]), node["bits"]
        return [node["offset"] + number(bits[i * width : (i + 1) * width]) for i in range(count)]
    assert node["form"] == "huffman"
    return huffman(bytes(parts["stream"]), dtype, count)


def float32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]  # type: ignore[no-any-return]


def unpack_bits(data: Any) -> list[int]:
    return [byte >> i & 1 for byte in data for i in range(7, -1, -1)]


def number(bits: list[int]) -> int:
    return int("".join(map(str, bits)) or "0", 2)


def unpacked(node: dict[str, Any], leaves: list[Leaf]) -> dict[str, Any]:
    shape, gap = node["type"][1], node["gap"]
    count, positions = math.prod(shape), dense(node["parts"]["positions"], leaves)
    walk = list(map(bool, positions))
    if gap:
        walk = [kept for s in positions for kept in [False] * s + [True] * (s < gap)][:count]
    inner = math.prod(shape[1:])
    order = [i % shape[0] * inner + i // shape[0] if node["columns"] else i for i in range(count)]

    def place(part: dict[str, Any]) -> dict[str, Any]:
        if part["form"] in IN_LAYOUT:
            names = IN_LAYOUT[part["form"]]
            return {**part, "parts": {k: place(p) if k in names else p for k, p in part["parts"].items()}}
        kept, elements = iter(dense(part, leaves)), [0] * count
        for at, keep in zip(order, walk, strict=True):
            elements[at] = next(kept) if keep else 0
        assert next(kept, None) is None
        return {"form": "flat", "elements": elements}

    mask = [False] * count
    for at, keep in zip(order, walk, strict=True):
        mask[at] = keep
    parts = {"mask": {"form": "flat", "elements": mask}, "values": place(node["parts"]["values"])}
    return {**node, "packed": False, "parts": parts}


def huffman(stream: bytes, dtype: str, count: int) -> Leaf:
    at, width, offset = 0, 1 if dtype == "bool" else struct.calcsize(STRUCT[dtype]), 0

    def take(n: int) -> bytes:
        nonlocal at
        at += n
        return stream[at - n : at]

    planes = []
    size = -(-count // 8) if dtype == "bool" else count
    for plane in range(width if count else 0):
        kind = take(1)[0]
        if kind >= 128 and plane == 0:
            kind, offset = kind - 128, int.from_bytes(take(width), "little")
        if kind < 2:
            planes.append(take(size) if kind == 0 else take(1) * size)
            continue
        first = take(1)[0] if kind == 3 else 0
        n = take(1)[0] + 1
        symbols = take(n) if kind == 4 else [(first + i) % 256 for i in range(n)]
        nibbles = [half for byte in take(-(-n // 2)) for half in (byte >> 4, byte & 15)]
        words: dict[tuple[int, int], int] = {}
        word = before = 0
        for length, symbol in sorted((length, s) for length, s in zip(nibbles, symbols, strict=False) if length):
            word = (word + 1) << length - before if words else 0
            words[length, word], before = symbol, length
        take(2 * (-(-size // 4096) - 1))
        bits, found, used = iter(unpack_bits(stream[at:])), bytearray(), 0
        for _ in range(size):
            word = length = 0
            while (length, word) not in words:
                word, length = word << 1 | next(bits), length + 1
            found.append(words[length, word])
            used += length
        take(-(-used // 8))
        planes.append(bytes(found))
    assert not any(stream[at:])
    if dtype == "bool":
        return [bool(bit) for bit in islice(unpack_bits(b"".join(planes)), count)]
    top = 8 * width
    raw = [sum(plane[i] << 8 * p for p, plane in enumerate(planes)) + offset & (1 << top) - 1 for i in range(count)]
    if dtype in ("f16", "f32", "f64"):
        raw = [word >> 1 | (word & 1) << top - 1 for word in raw]
    return list(struct.unpack(f"<{count}{STRUCT[dtype]}", b"".join(word.to_bytes(width, "little") for word in raw)))


def model() -> nn.Module:
    """A tree of every form, with every kind of leaf."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(70, 80), nn.Linear(80, 10), nn.Linear(10, 30), nn.BatchNorm1d(30), nn.Linear(30, 3))
    book = torch.linspace(-0.2, 0.2, 16)
    trees: dict[str, Encoded] = {}
    for target in targets(made):
        x = target.tensor.detach()
        if target.is_weight:
            indices = (x[..., None] - book).abs().argmin(-1).to(torch.uint8)
            trees[target.name] = Encoded(Codebook(), {"codebook": book, "indices": indices}, x.shape, x.dtype)
    for name, least in (("0.weight", 0.1), ("1.weight", 0.05), ("2.weight", 0.25)):
        x = made.get_parameter(name).detach()
        mask = x.abs() > least
        mask[:, ::3] = False
        trees[name] = Encoded(Sparse(), {"mask": mask, "values": trees[name]}, x.shape, x.dtype)
    x = made[4].weight.detach()
    codes, side = (x * 700 + 9).to(torch.int16), torch.rand(3, 4)
    parts = {"codes": codes, "scale": side, "zero": torch.randint(-9, 9, (3, 4), dtype=torch.int8)}
    trees["4.weight"] = Encoded(Affine(0, 8, 9, False), parts, x.shape, x.dtype)
    x = made[0].bias.detach()
    trees["0.bias"] = Encoded(
        Affine(0, bits=4), {"codes": (x * 50).to(torch.int8), "scale": torch.rand(80)}, x.shape, x.dtype
    )
    for target in targets(made):
        if target.name in trees:
            store(made, target, trees[target.name], "1: test")
    return made


@pytest.mark.parametrize("tail", [(), ("code.bits",), ("code.huffman",), ("code.bits", "code.huffman")])
def test_a_reader_written_from_the_document(tmp_path: Path, tail: tuple[str, ...]) -> None:
    made = model()
    save(made, tmp_path / "x", tail=[make(name) for name in tail])
    _, tensors = read((tmp_path / "x").read_bytes())
    assert list(tensors) == [t.name for t in targets(made)]
    for target in targets(made):
        assert tensors[target.name] == target.tensor.reshape(-1).tolist(), target


def test_the_example(tmp_path: Path) -> None:
    made = nn.Sequential(nn.Linear(3, 2))
    weight = torch.tensor([[1.0, -1, 1], [1, 1, -1]])
    indices = (weight > 0).to(torch.uint8)
    book = {"codebook": torch.tensor([-1.0, 1.0]), "indices": indices}
    store(made, targets(made)[0], Encoded(Codebook(), book, weight.shape, weight.dtype), "1: test")
    made[0].bias.data = torch.tensor([0.5, 0.25])
    arguments = {"layers": [["Linear", {"in_features": 3, "out_features": 2}]]}
    store_of(made).source = Source(builder="chain", arguments=arguments)
    size = save(made, tmp_path / "x")
    dump = b"".join(bytes.fromhex(line[4:]) for line in BLOCKS[0].splitlines())
    assert len(dump) == 90
    meta, tensors = read(dump)
    assert meta == json.loads(BLOCKS[1]) and tensors["0.bias"] == [0.5, 0.25]
    found = (tmp_path / "x").read_bytes()
    assert read(found) == (meta, tensors) and (size == 90) == (found == dump)  # other zlibs may deflate otherwise


def test_the_document_knows_every_dtype() -> None:
    assert all(f"`{name}`" in DOCUMENT for name in DTYPES)
