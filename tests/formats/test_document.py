"""docs/format.md says enough: a reader in plain Python, written from it alone."""

import hashlib
import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smelt.core.encoded import Encoded
from smelt.core.method import Stats, make
from smelt.core.source import Source
from smelt.core.store import store, store_of
from smelt.core.target import targets
from smelt.formats._container import DTYPES
from smelt.formats.pack import pack
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
EXPONENTS = {"f8e4m3fn": 4, "f8e5m2": 5}
STRUCT |= dict.fromkeys(EXPONENTS, "B")
DEFAULTS: dict[str, dict[str, Any]] = {
    "affine": {"axis": None, "group": 0, "bits": 8, "symmetric": True, "top": 1},
    "scaled": {"axis": None, "group": 0, "top": 1},
    "levels": {"kind": "normal", "bits": 4, "parameter": 0},
    "sparse": {"packed": False, "gap": 0, "columns": False},
    "bits": {"bits": 1, "offset": 0},
    "entropy": {"start": 0},
}
IN_LAYOUT = {"affine": ["codes"], "codebook": ["indices"], "sparse": ["mask", "values"]}
IN_LAYOUT |= {"levels": ["codes"], "scaled": ["values"], "float": ["values"], "exponent": ["exponents"]}
Leaf = list[Any]


def read(data: bytes) -> tuple[Any, dict[str, Leaf]]:
    """(the meta, the elements of every tensor)"""
    magic, version, length, crc = struct.unpack("<6sHII", data[:16])
    begin = len(data) - length if version >= 32768 else 16
    head = data[begin : begin + length]
    assert (magic, version % 32768, crc) == (b"\x8bsmelt", 1, zlib.crc32(data[:12] + head))
    inflate = zlib.decompressobj(-15, zdict=DICTIONARY)
    meta = json.loads(inflate.decompress(head))
    types: list[tuple[str, list[int]]] = []
    unsealed: set[int] = set()
    trees = {name: parse(part, ("f32", []), types, unsealed) for name, part in pairs(meta["tensors"])}
    sizes = [math.prod(shape) * struct.calcsize(STRUCT[dtype]) for dtype, shape in types]
    rest, at, leaves = inflate.unused_data, 16 if version >= 32768 else 16 + length, []
    checked = [i for i, size in enumerate(sizes) if size >= 256 and i in unsealed]
    sums = struct.unpack(f"<{len(checked)}I", rest[sum(size for size in sizes if size < 256) :])
    check = dict(zip(checked, sums, strict=True))
    for i, ((dtype, shape), size) in enumerate(zip(types, sizes, strict=True)):
        if size < 256:
            raw, rest = rest[:size], rest[size:]
        else:
            at += -at % 64 if size >= 4096 and not (dtype == "u8" and len(shape) == 1) else 0
            raw, at = data[at : at + size], at + size
            assert i not in check or zlib.crc32(raw) == check[i]
        leaves.append(elements(raw, dtype))
    assert at == (begin if version >= 32768 else len(data))
    return meta, {name: dense(tree, leaves) for name, tree in trees.items()}


def elements(raw: bytes, dtype: str) -> list[Any]:
    found = list(struct.unpack(f"<{len(raw) // struct.calcsize(STRUCT[dtype])}{STRUCT[dtype]}", raw))
    return [levels("float", 8, EXPONENTS[dtype])[byte] for byte in found] if dtype in EXPONENTS else found


def pairs(items: list[Any]) -> list[tuple[str, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def parse(
    part: Any, above: tuple[str, list[int]], types: list[tuple[str, list[int]]], unsealed: set[int], form: str = ""
) -> dict[str, Any]:
    """form: of the node above."""
    if isinstance(part, list) and len(part) > 1 and isinstance(part[1], dict):
        form, settings, kind, *rest = part
        own = relative(kind, above)
        parts = {name: parse(inner, own, types, unsealed, form) for name, inner in pairs(rest)}
        return {"form": form, **DEFAULTS.get(form, {}), **settings, "type": own, "parts": parts}
    number = len(types)
    if isinstance(part, int) and part < 0:
        number = -1 - part
    else:
        types.append(relative(part, above))
    if form != "entropy":
        unsealed.add(number)
    return {"form": "leaf", "leaf": number}


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
    if node["form"] == "float":
        return list(parts["values"])
    if node["form"] == "exponent":
        return [2.0**e for e in parts["exponents"]]
    if node["form"] == "levels":
        table = levels(node["kind"], node["bits"], node["parameter"])
        return [table[c] for c in parts["codes"]]
    if node["form"] in ("affine", "scaled"):
        inner = math.prod(shape[(node["axis"] or 0) + 1 :])
        side = [0 if node["axis"] is None else i // inner % shape[node["axis"]] for i in range(count)]
        if node["group"]:
            inner = count if node["axis"] is None else inner
            groups = -(-inner // node["group"])
            side = [i // inner * groups + i % inner // node["group"] for i in range(count)]
        scale = [float32(s / node["top"]) for s in parts["scale"]]
        if node["form"] == "scaled":
            return [float32(v * scale[s]) for v, s in zip(parts["values"], side, strict=True)]
        zero = parts.get("zero", [0] * count)
        return [float32(float32(c - zero[s]) * scale[s]) for c, s in zip(parts["codes"], side, strict=True)]
    if node["form"] == "bits":
        if node["bits"] == 8 * struct.calcsize(STRUCT[dtype]) and dtype != "bool":
            return elements(bytes(parts["packed"]), dtype)
        bits, width = unpack_bits(parts["packed"]), node["bits"]
        return [node["offset"] + number(bits[i * width : (i + 1) * width]) for i in range(count)]
    assert node["form"] == "entropy"
    begin = node["start"]
    return entropy(bytes(parts["stream"]), dtype, begin + count)[begin : begin + count]


def levels(kind: str, bits: int, parameter: Any) -> list[float]:
    half = 1 << bits - 1
    if kind == "normal":
        o = float32(round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7))

        def side(n: int) -> list[float]:
            step = float32(float32(0.5 - o) / n)
            points = [float32(o + float32(step * i)) for i in range(n)]
            points[(n + 1) // 2 :] = [float32(0.5 - float32(step * (n - i))) for i in range((n + 1) // 2, n)]
            return [float32(NormalDist().inv_cdf(p)) for p in points]

        found = [*(-v for v in side(half - 1)), 0.0, *reversed(side(half))]
        return [float32(v / found[-1]) for v in found]
    most = half - 1
    if kind == "float":
        mantissa, bias = bits - 1 - parameter, 2 ** (parameter - 1) - 1
        unit = 1 << mantissa
        positive = [
            m / unit * 2.0 ** (1 - bias) if m < unit else (1 + m % unit / unit) * 2.0 ** (m // unit - bias)
            for m in range(half)
        ]
    elif kind == "log":
        positive = [0.0, *(2.0 ** ((m - most) / parameter) for m in range(1, half))]
    elif kind == "mu":
        positive = [((1 + parameter) ** (m / most) - 1) / parameter for m in range(half)]
    elif kind == "power":
        positive = [(m / most) ** (1 / parameter) for m in range(half)]
    else:
        assert kind == "sums"
        n, r = divmod(bits - 1, 2)
        sets = [[0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + r)] for i in range(n)] + [[0.0, 4.0**-n]] * r
        totals = sorted(sum(one) for one in itertools.product(*sets))
        positive = [v / totals[-1] for v in totals]
    return [float32(v) for v in positive] + [-float32(v) for v in positive]


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


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value, at = value | (data[at] & 127) << shift, at + 1
        if data[at - 1] < 128:
            return value, at
        shift += 7


def entropy(data: bytes, dtype: str, count: int) -> Leaf:
    flags, at = data[0], 1
    width, chunk = 1 << (flags & 3), 20
    assert width == struct.calcsize(STRUCT[dtype])
    if not flags & 16:
        count, at = varint(data, at)
    ends = [len(data)]
    if flags & 4:
        chunk, chunks = data[at], -(-count >> data[at])
        sizes = struct.unpack(f"<{chunks}I", data[at + 1 : at + 1 + 4 * chunks])
        at += 1 + 4 * chunks
        ends = [at + sum(sizes[: i + 1]) for i in range(chunks)]
        assert not any(data[ends[-1] if ends else at :])
    found: list[int] = []
    for end in ends if count else []:
        part = data[at:end]
        if flags & 8:
            (crc,) = struct.unpack("<I", part[:4])
            part = part[4:]
            assert zlib.crc32(part) == crc
        found += body(part, min(1 << chunk, count - len(found)), width)
        at = end
    raw = b"".join(x.to_bytes(width, "little") for x in found)
    return elements(raw, dtype)


def body(data: bytes, m: int, w: int) -> list[int]:
    kind, data = data[0], data[1:]
    if kind == 0:
        assert len(data) == m * w
        return [int.from_bytes(data[i * w : i * w + w], "little") for i in range(m)]
    if kind == 1:
        return [int.from_bytes(data, "little")] * m
    if kind == 2:
        return split(data, m, w)
    if kind == 3:
        planes = []
        for plane in range(w):
            length, at = varint(data, 0) if plane < w - 1 else (len(data), 0)
            planes.append(body(data[at : at + length], m, 1))
            data = data[at + length :]
        return [sum(plane[i] << 8 * p for p, plane in enumerate(planes)) for i in range(m)]
    if kind in (4, 7):
        return [x << (4 * w if kind == 4 else 0) for x in body(data, m, w // 2)]
    if kind == 5:
        halves = [x.to_bytes(2, "little") for x in body(data, m, 2)]
        return [int.from_bytes(struct.pack("<f", struct.unpack("<e", half)[0]), "little") for half in halves]
    if kind == 6:
        offset = int.from_bytes(data[:w], "little")
        return [(x + offset) % (1 << 8 * w) for x in body(data[w:], m, w)]
    if kind == 8:
        return unpack_bits(body(data, -(-m // 8), 1))[:m]
    if kind == 9:
        nibbles = body(data, 2 * m, 1)
        return [low + 16 * high for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]
    if kind == 11:
        length, at = varint(data, 0)
        mask = body(data[at : at + length], m, 1)
        values = iter(body(data[at + length :], sum(mask), w) if any(mask) else [])
        return [next(values) if one else 0 for one in mask]
    assert kind == 10 and w == 1
    return symbols(data, m)


def split(data: bytes, m: int, w: int) -> list[int]:
    r, rotated, at = data[0] & 63, data[0] >> 6, 1
    rest, shift = [0] * m, 0
    for c in (32, 16, 8, 4, 2, 1):
        if not r & c:
            continue
        if c >= 8:
            for j in range(m):
                rest[j] |= int.from_bytes(data[at + j * c // 8 : at + (j + 1) * c // 8], "little") << shift
            at += m * c // 8
        else:
            for begin in range(0, m, 128):
                b = min(128, m - begin)
                t = -(-b * c // 8)
                for j in range(b):
                    rest[begin + j] |= (data[at + j % t] >> c * (j // t) & (1 << c) - 1) << shift
                at += t
        shift += c
    words = [s << r | x for s, x in zip(symbols(data[at:], m), rest, strict=True)]
    return [x >> 1 | (x & 1) << 8 * w - 1 for x in words] if rotated else words


def symbols(data: bytes, m: int) -> list[int]:
    return rans(data, m) if data[0] >> 4 == 1 else huffman(data, m)


def huffman(data: bytes, m: int) -> list[int]:
    segments, listed, at = (1, 4, 8)[data[0] & 3], data[0] & 4, 1
    first = 0 if listed else data[at]
    at += not listed
    number = data[at] + 1
    at += 1
    values = list(data[at : at + number]) if listed else list(range(first, first + number))
    at += number if listed else 0
    nibbles = [half for byte in data[at : at + -(-number // 2)] for half in (byte >> 4, byte & 15)]
    at += -(-number // 2)
    words: dict[tuple[int, int], int] = {}
    word = before = 0
    for length, symbol in sorted((n, s) for n, s in zip(nibbles, values, strict=False) if n):
        word = (word + 1) << length - before if words else 0
        words[length, word], before = symbol, length
    sizes = []
    for _ in range(segments - 1):
        size, at = varint(data, at)
        sizes.append(size)
    each, found = -(-m // segments), []
    for i in range(segments):
        part = data[at : at + sizes[i]] if i < segments - 1 else data[at:]
        at += len(part)
        bits = iter([byte >> j & 1 for byte in part for j in range(8)])
        for _ in range(max(0, min(each, m - i * each))):
            word = length = 0
            while (length, word) not in words:
                word, length = word << 1 | next(bits), length + 1
            found.append(words[length, word])
        left = list(bits)
        assert len(left) < 8 and not any(left)
    return found


def rans(data: bytes, m: int) -> list[int]:
    k, escapes, several = (16, 32, 256)[data[0] & 3], data[0] & 4, data[0] & 8
    lanes, listed, precision = 1 << (data[1] & 7), data[1] & 8, data[1] >> 4
    entries, at = data[2] + 1, 3
    own = entries - bool(escapes)
    values = list(data[at : at + own]) if listed else [data[at] + i for i in range(own)]
    at += own if listed else 1
    tables = 1
    if several:
        tables, at = data[at] + 1, at + 1
    bits, used = unpack_bits(data[at:]), 0

    def take(n: int) -> int:
        nonlocal used
        used += n
        return number(bits[used - n : used])

    def gamma() -> int:
        zeros = bits.index(1, used) - used
        take(zeros)
        return take(zeros + 1)

    made = []
    for _ in range(tables):
        units = [gamma() - 1 for _ in range(entries - 1)]
        units.append((1 << precision) - sum(units))
        made.append(slots([f << 16 - precision for f in units], k))
    classes = [take((tables - 1).bit_length()) for _ in range(-(-m // 1024))] if several else []
    assert not any(bits[used : -(-used // 8) * 8])
    at += -(-used // 8)
    strange, position = {}, 0
    if escapes:
        count, at = varint(data, at)
        for _ in range(count):
            gap, at = varint(data, at)
            position += gap
            strange[position], at = data[at], at + 1
    states = list(struct.unpack(f"<{lanes}I", data[at : at + 4 * lanes]))
    words = iter(struct.unpack(f"<{(len(data) - at) // 2 - 2 * lanes}H", data[at + 4 * lanes :]))
    found = []
    for i in range(-(-m // lanes) * lanes):
        entry, frequency, rank = made[classes[i // 1024] if several else 0][states[i % lanes] % 65536]
        x = frequency * (states[i % lanes] // 65536) + rank
        states[i % lanes] = x * 65536 + next(words) if x < 65536 else x
        found.append(strange.get(i, 0) if escapes and entry == own else values[entry])
    assert set(states) == {65536} and next(words, None) is None
    return found[:m]


def slots(frequencies: list[int], k: int) -> list[tuple[int, int, int]]:
    """Of every slot: its entry, the entry's frequency, the rank."""
    whole = 65536 // k
    rest = frequencies + [0] * (k - len(frequencies))
    frequencies = list(rest)
    below, other = [whole] * k, list(range(k))
    small, large = [i for i in range(k) if rest[i] < whole], [i for i in range(k) if rest[i] >= whole]
    while small and large:
        s, top = small.pop(), large[-1]
        below[s], other[s] = rest[s], top
        rest[top] -= whole - rest[s]
        if rest[top] < whole:
            small.append(large.pop())
    offset, found = list(below), [(0, 0, 0)] * 65536
    for b in range(k):
        for position in range(whole):
            alias = position >= below[b]
            entry = other[b] if alias else b
            rank = position - below[b] + offset[entry] if alias else position
            found[position * k + b] = (entry, frequencies[entry], rank)
        if below[b] < whole:
            offset[other[b]] += whole - below[b]
    return found


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


def narrow() -> nn.Module:
    """Forms of narrow numbers and their scales, and every kind of level."""
    torch.manual_seed(0)
    numbers = [{"format": f} for f in ("fp16", "e4m3", "mxfp4", "mxfp6", "nf")] + [{"format": "nf", "bits": 3}]
    numbers += [{"format": "mxfp8", "element": "e5m2"}, {"format": "nf", "scales": "double", "group": 4}]
    codecs = [make("quantize.float", settings) for settings in numbers]
    codecs += [make("quantize.fixed"), make("quantize.power"), make("quantize.power", {"curve": "mu"})]
    codecs += [make("quantize.log", {"base": base, "bits": bits}) for base, bits in (("sqrt2", 4), ("apot", 5))]
    codecs.append(make("quantize.log", {"base": "apot", "bits": 6}))
    made = nn.Sequential(*[nn.Linear(40, 9, bias=False) for _ in codecs])
    for i, (target, codec) in enumerate(zip(targets(made), codecs, strict=True)):
        x, where = target.tensor.detach(), target.tensor > -0.1
        tree = codec.encode(x, codec.fit(x, Stats(where)))
        sparse = Encoded(Sparse(), {"mask": where, "values": tree}, x.shape, x.dtype)
        store(made, target, sparse if i % 2 else tree, "1: test")
    return made


@pytest.mark.parametrize("model", [model, narrow])
@pytest.mark.parametrize("tail", [(), ("code.bits",), ("code.huffman",), ("code.bits", "code.entropy")])
def test_a_reader_written_from_the_document(
    tmp_path: Path, tail: tuple[str, ...], model: Callable[[], nn.Module]
) -> None:
    made = model()
    save(made, tmp_path / "x", tail=[make(name) for name in tail])
    _, tensors = read((tmp_path / "x").read_bytes())
    assert list(tensors) == [t.name for t in targets(made)]
    for target in targets(made):
        assert tensors[target.name] == target.tensor.reshape(-1).tolist(), target


def test_a_packed_checkpoint(tmp_path: Path) -> None:
    tensors = {f"b{i}": torch.arange(40.0) + i for i in range(9)}
    tensors |= {"w": torch.randn(30, 30), "n": torch.randint(0, 256, (70, 80), dtype=torch.uint8), "s": torch.tensor(7)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"of": "x"})
    pack(tmp_path / "x.safetensors")
    original = (tmp_path / "x.safetensors").read_bytes()
    meta, found = read((tmp_path / "x.smelt").read_bytes())
    origin, data = meta["origin"], b""
    header = json.loads(origin["header"])
    del header["__metadata__"]
    assert list(found) == sorted(header, key=lambda name: header[name]["data_offsets"])
    for name, values in found.items():
        data += struct.pack(f"<{len(values)}{STRUCT[header[name]['dtype'].lower()]}", *values)
    assert struct.pack("<Q", len(origin["header"])) + origin["header"].encode() + data == original
    assert (origin["bytes"], origin["sha256"]) == (len(original), hashlib.sha256(original).hexdigest())


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
