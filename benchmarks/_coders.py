"""The codecs that entropy.py compares; a peer is one function that gives its codecs for an array.

What only brings the array into the form that a library wants is not in its times: the shuffled bytes for zstandard, the
int32 for constriction, and for ZipNN, which writes over its input, a copy of it (timed on its own).
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from smelt.native.stream import Stream, encode


def _bytes(found: Any) -> np.ndarray:
    return np.frombuffer(found, np.uint8)


@dataclass
class Codec:
    """encode(prepare()) gives what decode takes; array gives what was decoded as the bytes of the original."""

    name: str
    prepare: Callable[[], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    size: Callable[[Any], int] = len
    array: Callable[[Any], np.ndarray] = _bytes
    given: np.ndarray | None = None  # what it decodes into; else that is fresh memory


def smelt(x: np.ndarray, kind: str, out: np.ndarray | None = None, checks: bool | None = None) -> Codec:
    """Into `out`, or into fresh memory; with checksums, unless `checks` is False."""

    def decode(coded: np.ndarray) -> np.ndarray:
        place = np.empty_like(x) if out is None else out
        Stream(coded).decode_into(place)
        return place

    return Codec("smelt", lambda: x, lambda data: encode(data, kind, checks=checks), decode, given=out)


def memcpy(x: np.ndarray, out: np.ndarray) -> Codec:
    def copy(data: np.ndarray) -> np.ndarray:
        np.copyto(out, data)
        return out

    return Codec("memcpy", lambda: x, lambda data: data, copy, lambda data: int(data.nbytes), given=out)


def zipnn(x: np.ndarray, kind: str) -> list[Codec]:
    from zipnn import ZipNN

    dtype = {("e8", 2): "bfloat16", ("e8", 4): "float32", ("e5", 2): "float16"}.get((kind, x.itemsize))
    if dtype is None:
        return []
    coder = ZipNN(bytearray_dtype=dtype, input_format="byte", threads=1)
    return [Codec("ZipNN", lambda: bytearray(x), coder.compress, coder.decompress)]


def zstandard(x: np.ndarray, kind: str) -> list[Codec]:
    import zstandard as zstd

    shuffled = np.ascontiguousarray(x.view(np.uint8).reshape(-1, x.itemsize).T)

    def array(decoded: bytes) -> np.ndarray:
        return np.ascontiguousarray(np.frombuffer(decoded, np.uint8).reshape(x.itemsize, -1).T).reshape(-1)

    def codec(level: int) -> Codec:
        compress, decompress = zstd.ZstdCompressor(level=level).compress, zstd.ZstdDecompressor().decompress
        return Codec(f"zstd {level}, shuffled", lambda: shuffled, compress, decompress, array=array)

    return [codec(1), codec(3)]


def aligned(x: np.ndarray) -> np.ndarray:
    """An array like `x`, touched, that begins at a multiple of 64 bytes, as torch allocates tensors."""
    room = np.zeros(x.nbytes + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + x.nbytes].view(x.dtype)


def blosc2(x: np.ndarray, kind: str) -> list[Codec]:
    import blosc2 as blosc

    out = aligned(x)

    def decode(coded: bytes) -> np.ndarray:
        blosc.decompress2(coded, dst=out, nthreads=1)
        return out

    def codec(name: str, how: Any, order: Any) -> Codec:
        given = {"codec": how, "filters": [order], "filters_meta": [0], "typesize": x.itemsize, "nthreads": 1}
        compress = partial(blosc.compress2, clevel=1, **given)
        return Codec(f"Blosc2 {name}", lambda: x, compress, decode, given=out)

    return [
        codec("zstd, shuffle", blosc.Codec.ZSTD, blosc.Filter.SHUFFLE),
        codec("lz4, bitshuffle", blosc.Codec.LZ4, blosc.Filter.BITSHUFFLE),
    ]


def openzl(x: np.ndarray, kind: str) -> list[Codec]:
    """Floats are taken apart and their exponents coded; symbols are coded as they are."""
    import openzl.ext as zl

    nodes = {("e8", 2): zl.nodes.BFloat16Deconstruct, ("e8", 4): zl.nodes.Float32Deconstruct}
    node = {**nodes, ("e5", 2): zl.nodes.Float16Deconstruct}.get((kind, x.itemsize))
    data = zl.Input(zl.Type.Serial if node is None else zl.Type.Numeric, x if node else x.view(np.uint8))

    def codec(name: str, coder: Any) -> Codec:
        compressor = zl.Compressor()
        graph = coder().parameterize(compressor)
        if node is not None:
            rest = zl.graphs.Store().parameterize(compressor)
            if kind == "e5":  # 11 bits of sign and mantissa come in two bytes
                bits = zl.graphs.Bitpack().parameterize(compressor)
                rest = compressor.build_static_graph(zl.nodes.ConvertStructToNumLE().parameterize(compressor), [bits])
            graph = compressor.build_static_graph(node().parameterize(compressor), [rest, graph])
        compressor.select_starting_graph(graph)

        def compress(given: Any) -> bytes:
            context = zl.CCtx()  # serves one call
            context.ref_compressor(compressor)
            context.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
            return bytes(context.compress([given]))

        def decompress(coded: bytes) -> np.ndarray:
            return np.asarray(zl.DCtx().decompress(coded)[0].content.as_nparray())

        return Codec(f"OpenZL {name}", lambda: data, compress, decompress)

    return [codec("Huffman", zl.graphs.Huffman), codec("FSE", zl.graphs.Fse)]


def constriction(x: np.ndarray, kind: str) -> list[Codec]:
    """Its probabilities are given to both sides; two bytes for each are added to the size."""
    if x.itemsize > 1:
        return []
    from constriction import stream

    symbols, counts = x.astype(np.int32), np.bincount(x).astype(np.float32)
    shares = counts / counts.sum()

    def compress(data: np.ndarray) -> np.ndarray:
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(data, stream.model.Categorical(shares, perfect=False))
        return np.asarray(coder.get_compressed())

    def decompress(coded: np.ndarray) -> np.ndarray:
        return np.asarray(stream.stack.AnsCoder(coded).decode(stream.model.Categorical(shares, perfect=False), x.size))

    def size(coded: np.ndarray) -> int:
        return int(coded.nbytes) + 2 * len(shares)

    return [Codec("constriction", lambda: symbols, compress, decompress, size, lambda found: found.astype(np.uint8))]


PEERS: dict[str, Callable[[np.ndarray, str], list[Codec]]] = {
    "zipnn": zipnn,
    "zstandard": zstandard,
    "blosc2": blosc2,
    "openzl": openzl,
    "constriction": constriction,
}


def missing() -> list[str]:
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


def peers(x: np.ndarray, kind: str) -> list[Codec]:
    absent = missing()
    return [codec for name, make in PEERS.items() if name not in absent for codec in make(x, kind)]


def against(ours: Codec, peer: Codec, x: np.ndarray, runs: int) -> dict[str, dict[str, Any]]:
    """Both by turns: bytes, and medians of the CPU seconds of preparing, encoding and decoding."""
    sides = {"ours": ours, "theirs": peer}
    coded, found = {}, {}
    for side, codec in sides.items():
        coded[side] = codec.encode(codec.prepare())
        found[side] = {"bytes": codec.size(coded[side])}

    def compare() -> None:
        for side, codec in sides.items():
            if codec.given is not None:
                codec.given.fill(1)
            same(codec.array(codec.decode(coded[side])), x.view(np.uint8), codec.name)

    spent: dict[tuple[str, str], list[float]] = defaultdict(list)

    def timed(side: str, what: str, call: Callable[..., Any], *given: Any) -> Any:
        start = time.process_time()
        result = call(*given)
        spent[side, what].append(time.process_time() - start)
        return result

    compare()
    for _ in range(runs):
        for side, codec in sides.items():
            timed(side, "decode", codec.decode, coded[side])
    compare()
    for _ in range(-(-runs // 2)):
        for side, codec in sides.items():
            data = timed(side, "prepare", codec.prepare)
            timed(side, "encode", codec.encode, data)
            del data
    for (side, what), times in spent.items():
        found[side][what] = statistics.median(times)
    return found


def alternate(
    calls: dict[str, Callable[[], Any]], runs: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Medians of seconds."""
    spent = defaultdict(list)
    for _ in range(runs):
        for name, call in calls.items():
            start = clock()
            call()
            spent[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def same(found: np.ndarray, wanted: np.ndarray, who: str) -> None:
    if not np.array_equal(found, wanted):
        raise AssertionError(f"{who}: decoded is not what was encoded")
