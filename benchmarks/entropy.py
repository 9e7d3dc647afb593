"""The entropy coder: size and CPU time of one thread, against other coders of weights and of symbols.

    make peers && SMELT_DATA=... python benchmarks/entropy.py

Every peer takes turns with ours, call by call, in one process; times are medians of CPU seconds, rates are of the
uncoded bytes.  "Given buffer": decoded into memory that was touched before; "fresh": into memory that the call takes.
Ours has checksums unless a row says otherwise; the tables give the median of its times against all peers.  Everything
decoded is compared with what was coded.  Cells run one after another, whatever --jobs says; finished ones are kept as
long as neither the library nor the benchmark changes (--fresh measures anew).
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _bench import HERE, Row, arguments, conditions, finish, run_cells
from _coders import against, aligned, alternate, memcpy, missing, peers, same, smelt
from _weights import CODEBOOKS, DATA, FLOATS, LLAMA, SYMBOLS, elements, llama, weights, zero

from smelt import native
from smelt.grids.kmeans import assign, optimal
from smelt.native.stream import LARGEST, Stream, encode

PEER = HERE / ".peers" / "nncodec" / "bin" / "python"
NNCODEC = (*CODEBOOKS, "int8", "int4")
LEVELS = ("portable", "NEON") if platform.machine() in ("aarch64", "arm64") else ("portable", "AVX2", "AVX-512")
NAMES = {"llama": "llama", "digits": "digits", "random": "random (synthetic)"}
MEGA, GIGA = 1e6, 1e9


# ---- cells: plain arguments, plain data


def cell(what: str, runs: int, build: str, **given: Any) -> Any:
    """One measurement of CELLS; `build` is what was measured, for the results that are kept."""
    return CELLS[what](runs=runs, **given)


def codecs_cell(network: str, size: int, data: str, runs: int) -> dict[str, Any]:
    """Ours and every peer on one array."""
    x, kind = elements(network, size, data)
    place = aligned(x)
    given, fresh = smelt(x, kind, place), smelt(x, kind)
    found: dict[str, Any] = {"bytes": x.nbytes, "entropy": _entropies(x, kind)}
    copy = memcpy(x, aligned(x))
    found["peers"] = {"memcpy": against(given, copy, x, runs)}
    found["unchecked"] = against(smelt(x, kind, place, checks=False), copy, x, runs)
    for peer in peers(x, kind):
        found["peers"][peer.name] = against(fresh if peer.given is None else given, peer, x, runs)
        if peer.name == "ZipNN":
            found["given"] = against(given, peer, x, runs)
    return found


def levels_cell(network: str, size: int, runs: int) -> dict[str, float]:
    """GB/s of decoding bf16 into a given buffer, for every coder and every level that this machine has."""
    library = native.coder()
    if library is None:
        return {}
    x, kind = elements(network, size, "bf16")
    out, calls = aligned(x), {}
    for coder in ("huffman", "rans"):
        chunks = []
        for begin in range(0, x.size, 1 << LARGEST):
            part = x[begin : begin + (1 << LARGEST)]
            body = encode(part, kind, coder=coder, checks=False, counted=False)[1:]  # a byte of flags, and one body
            chunks.append((body, out[begin:].ctypes.data, part.size))
        for level in range(library.smelt_best_level() + 1):

            def decode(level: int = level, chunks: Sequence[tuple[np.ndarray, int, int]] = chunks) -> None:
                for body, to, count in chunks:
                    if library.smelt_chunk_decode(body.ctypes.data, body.size, to, count, x.itemsize, level):
                        raise ValueError("a chunk was not decoded")

            out[:] = 1
            decode()
            same(out, x, f"{coder}, {LEVELS[level]}")
            calls[f"{coder}, {LEVELS[level]}"] = decode
    return {name: x.nbytes / spent / GIGA for name, spent in alternate(calls, runs).items()}


def nncodec_cell(network: str, size: int, data: str, runs: int) -> dict[str, Any]:
    codes, _ = elements(network, size, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "symbols.npy"
        np.save(path, codes.view(np.int8) if data == "int8" else codes)
        given = [path, zero(network, size, data), CODEBOOKS.get(data, 0), runs]
        call = [str(PEER), str(HERE / "_deepcabac.py"), *map(str, given)]
        done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"NNCodec on {network}, {data}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kmeans_cell(network: str, size: int, count: int, clusters: int, runs: int) -> dict[str, float]:
    """Against scikit-learn with one start of k-means++ a run; the best inertia of its runs counts."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    flat = np.concatenate([tensor.reshape(-1) for tensor in weights(network, size)])
    values = np.random.default_rng(0).choice(flat, min(count, flat.size), replace=False)

    def inertia(centers: np.ndarray) -> float:
        return float(((values - centers[assign(values, centers)]) ** 2).sum())

    ours, theirs, spent = [], [], defaultdict(list)
    with threadpool_limits(1):
        for run in range(runs):
            start = time.process_time()
            centers = optimal(values, clusters)
            spent["ours"].append(time.process_time() - start)
            ours.append(inertia(centers))
            model = KMeans(clusters, init="k-means++", n_init=1, random_state=run)
            start = time.process_time()
            model.fit(values[:, None])
            spent["theirs"].append(time.process_time() - start)
            theirs.append(inertia(np.sort(model.cluster_centers_[:, 0].astype(np.float64))))
    seconds = {side: statistics.median(times) for side, times in spent.items()}
    return {**seconds, "inertia": max(ours), "peer_inertia": min(theirs), "count": values.size}


def threads_cell(network: str, size: int, runs: int) -> dict[str, float]:
    """Wall times of one and of two threads on bf16."""
    x, kind = elements(network, size, "bf16")
    out, stream = aligned(x), encode(x, kind)

    def decode(threads: int) -> None:
        Stream(stream).decode_into(out, threads=threads)

    calls: dict[str, Callable[[], Any]] = {}
    for threads in (1, 2):
        out[:] = 1
        decode(threads)
        same(out, x, f"{threads} threads")
        calls[f"decode {threads}"] = lambda threads=threads: decode(threads)
    decoded = alternate(calls, runs, time.perf_counter)
    calls = {f"encode {n}": lambda n=n: encode(x, kind, threads=n) for n in (1, 2)}
    return {**decoded, **alternate(calls, -(-runs // 2), time.perf_counter), "bytes": x.nbytes}


CELLS: dict[str, Callable[..., Any]] = {
    "codecs": codecs_cell,
    "levels": levels_cell,
    "nncodec": nncodec_cell,
    "kmeans": kmeans_cell,
    "threads": threads_cell,
}


def _entropies(x: np.ndarray, kind: str) -> list[float]:
    """Of order 0, in bits, of the whole array: of symbols; of bf16 [exponent, sign and mantissa]; else nothing."""
    if x.itemsize == 1:
        planes = [x]
    elif x.itemsize == 2 and kind == "e8":
        planes = [(x >> 7).astype(np.uint8), (x >> 8 & 128 | x & 127).astype(np.uint8)]
    else:
        planes = []
    found = []
    for plane in planes:
        share = np.bincount(plane) / plane.size
        share = share[share > 0]
        found.append(float(-(share * np.log2(share)).sum()))
    return found


# ---- rows


class Rows:
    """The rows with a target, and which of them miss it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.missed: list[str] = []

    def add(
        self,
        measure: str,
        value: float,
        unit: str,
        limit: tuple[str, float] | None = None,
        peer: str | None = None,
        peer_value: float | None = None,
    ) -> None:
        """limit: (">=" or "<=", what is aimed at); at most peer_value is said as such."""
        target = None
        if limit:
            how, least = limit
            target = "no more than the peer" if least == peer_value else f"{how} {least:g} {unit}"
            if not (value >= least if how == ">=" else value <= least):
                self.missed.append(f"{measure}: {value:.4g} {unit}, target {target}")
        self.rows.append(Row(measure, value, unit, peer, peer_value, target))


def bf16_rows(rows: Rows, name: str, found: dict[str, Any]) -> None:
    size, name = found["bytes"], f"{name} bf16"
    copy, zipnn = found["peers"]["memcpy"], found["peers"].get("ZipNN")
    for how, pair in (("", copy), (", no checksums", found["unchecked"])):
        rate, theirs = _rate(size, pair["ours"]), _rate(size, pair["theirs"])
        what, peer = f"{name}, decode, given buffer{how}", "memcpy, GB/s"
        rows.add(what, rate, "GB/s", None if how else (">=", 10), peer, theirs)
        rows.add(f"{what}: times memcpy's", theirs / rate, "x", None if how else ("<=", 1.5), peer, theirs)
    if zipnn:
        rate = _rate(size, zipnn["theirs"])
        ratio = zipnn["theirs"]["decode"] / zipnn["ours"]["decode"]
        rows.add(f"{name}, decode, both fresh: speed over", ratio, "x", (">=", 3), "ZipNN, GB/s", rate)
        given = found["given"]
        ratio, rate = given["theirs"]["decode"] / given["ours"]["decode"], _rate(size, given["theirs"])
        rows.add(f"{name}, decode, ours into a given buffer: speed over", ratio, "x", None, "ZipNN, GB/s", rate)
        part = 100 * zipnn["theirs"]["bytes"] / size
        rows.add(f"{name}, size", 100 * zipnn["ours"]["bytes"] / size, "%", ("<=", part), "ZipNN", part)
        ours, bare = zipnn["ours"]["encode"], zipnn["theirs"]["encode"]
        rate = size / bare / GIGA
        rows.add(f"{name}, encode, without its copy: speed over", bare / ours, "x", (">=", 1.3), "ZipNN, GB/s", rate)
        whole = bare + zipnn["theirs"]["prepare"]
        rate = size / whole / GIGA
        rows.add(f"{name}, encode, with its copy: speed over", whole / ours, "x", None, "ZipNN, GB/s", rate)
    exponent, rest = found["entropy"]
    bits = 8 * copy["ours"]["bytes"] / (size / 2)
    over = 100 * (bits / (exponent + rest) - 1)
    rows.add(f"{name}, size over order-0 entropy", over, "%", ("<=", 0.35))
    rows.add(f"{name}, exponents over order-0 entropy", 100 * ((bits - 8) / exponent - 1), "%", ("<=", 0.25))


def symbol_rows(rows: Rows, name: str, data: str, found: dict[str, Any]) -> None:
    size, copy = found["bytes"], found["peers"]["memcpy"]
    over = 100 * (8 * copy["ours"]["bytes"] / size / found["entropy"][0] - 1)
    rows.add(f"{name} {data}, size over order-0 entropy", over, "%", ("<=", 0.5) if data in CODEBOOKS else None)
    if data in ("k-means 16", "int4"):
        rate = _rate(size, copy["ours"])
        rows.add(f"{name} {data}, decode, given buffer", rate, "Gsymbols/s", (">=", 5))


def nncodec_rows(rows: Rows, name: str, data: str, found: dict[str, Any]) -> None:
    name, ours, theirs, count = f"{name} {data}", found["ours"], found["theirs"], found["symbols"]
    unit, peer = "bits/symbol", f"NNCodec, param_opt {found['param_opt']}"
    bits = 8 * theirs["bytes"] / count
    rows.add(f"{name}, size", 8 * ours["bytes"] / count, unit, ("<=", bits), peer, bits)
    for what, limit in (("decode", (">=", 100.0)), ("encode", None)):
        rate = count / theirs[what] / MEGA
        rows.add(f"{name}, {what}: speed over", theirs[what] / ours[what], "x", limit, f"{peer}, Msymbols/s", rate)


def level_rows(rows: Rows, name: str, found: dict[str, float]) -> None:
    least = {"rans, AVX2": 3.0, "huffman, portable": 1.0, "rans, portable": 0.6}
    for setting, rate in found.items():
        limit = (">=", least[setting]) if setting in least else None
        rows.add(f"{name} bf16, decode, given buffer: {setting}", rate, "GB/s", limit)


def kmeans_rows(rows: Rows, name: str, clusters: int, found: dict[str, float]) -> None:
    name = f"{name}, {found['count'] / MEGA:.2g} M weights, k-means {clusters}"
    ratio = found["theirs"] / found["ours"]
    limit = (">=", 100.0) if found["count"] >= MEGA else None
    rows.add(f"{name}: speed over", ratio, "x", limit, "scikit-learn, s", found["theirs"])
    best = found["peer_inertia"]
    rows.add(f"{name}: inertia", found["inertia"], "", ("<=", best), "scikit-learn, best run", best)


def thread_rows(rows: Rows, name: str, found: dict[str, float]) -> None:
    for what in ("decode", "encode"):
        ratio = found[f"{what} 1"] / found[f"{what} 2"]
        limit = (">=", 1.7) if what == "decode" else None
        alone = found["bytes"] / found[f"{what} 1"] / GIGA
        rows.add(f"{name} bf16, {what}, two threads: speed over", ratio, "x", limit, "one thread, GB/s", alone)


def _rate(size: int, side: dict[str, Any]) -> float:
    return size / side["decode"] / GIGA


# ---- tables of all codecs


def table(found: dict[str, dict[str, Any]]) -> list[Row]:
    """Print a table, a line for each input; its numbers as rows."""
    lines: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, one in found.items():
        size, line = one["bytes"], lines.setdefault(name, {})
        for given, label in ((True, "smelt, given buffer"), (False, "smelt, fresh")):
            sides = [pair["ours"] for peer, pair in one["peers"].items() if _given(peer) == given]
            if sides:
                line[label] = _three(size, {k: statistics.median(side[k] for side in sides) for k in sides[0]})
        line.update({peer: _three(size, pair["theirs"]) for peer, pair in one["peers"].items()})
    columns = list(dict.fromkeys(label for line in lines.values() for label in line))
    print(f"\n| size in %, encode in GB/s, decode in GB/s | bound | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for name, line in lines.items():
        planes = found[name]["entropy"]  # each of 8 bits
        bound = f"{100 * sum(planes) / (8 * len(planes)):.2f}" if planes else ""
        cells = [_shown(label, *line[label]) if label in line else "" for label in columns]
        print(f"| {name} | {bound} | {' | '.join(cells)} |")
    units = ("%", "GB/s", "GB/s")
    return [
        Row(f"{name}, {label}: {what}", value, unit)
        for name, line in lines.items()
        for label, three in line.items()
        for what, value, unit in zip(("size", "encode", "decode"), three, units, strict=True)
    ]


def _given(peer: str) -> bool:
    return peer == "memcpy" or peer.startswith("Blosc2")


def _three(size: int, side: dict[str, Any]) -> tuple[float, float, float]:
    return 100 * side["bytes"] / size, size / max(side["encode"], 1e-9) / GIGA, _rate(size, side)


def _shown(label: str, size: float, encoded: float, decoded: float) -> str:
    return f"{decoded:.3g}" if label == "memcpy" else f"{size:.2f}, {encoded:.3g}, {decoded:.3g}"


# ---- the whole


def plan(quick: bool) -> list[dict[str, Any]]:
    """The arguments of all cells; those of one network after another, which keeps its weights in memory."""
    runs = 3 if quick else 9
    sizes = {"digits": 1024 if quick else 4096, "random": 1 << (22 if quick else 26)}
    cells: list[dict[str, Any]] = []
    for network, size in {**({"llama": 0} if llama() else {}), **sizes}.items():
        one = {"network": network, "size": size, "runs": runs}
        if quick:
            names: Sequence[str] = ("bf16", "fp32", "k-means 16", "sparse mask") if network == "digits" else ("bf16",)
        else:
            names = (*FLOATS,) if network == "random" else DATA
        cells += [{"what": "codecs", "data": data, **one} for data in names]
        if network == "digits" or not quick:
            cells.append({"what": "levels", **one})
        if PEER.exists() and network != "random":
            wanted = () if quick and network == "llama" else ("k-means 16",) if quick else NNCODEC
            cells += [{"what": "nncodec", "data": data, **one} for data in wanted]
        if network == "digits":
            count, clusters = (100_000, (16,)) if quick else (1_000_000, (16, 256))
            few = {**one, "runs": 3, "count": count}
            cells += [{"what": "kmeans", "clusters": k, **few} for k in clusters]
        if network == "random":
            cells.append({"what": "threads", **one})
    return cells


def build() -> str:
    """Changes with the library, and with what measures it."""
    root = HERE.parent / "src" / "smelt"
    files = sorted([*root.glob("native/*"), *root.glob("grids/*"), *HERE.glob("_*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.is_file())).hexdigest()[:16]


def main() -> int:
    args = arguments(__doc__ or "")
    library = native.coder()
    if library is None:
        return 1
    print(f"{conditions()}, {LEVELS[library.smelt_best_level()]}")
    for name in missing():
        print(f"missing peer: {name}; `make peers` installs it")
    if not PEER.exists():
        print(f"missing peer: NNCodec, in an environment of its own at {PEER.parent.parent}; `make peers` creates it")
    if not llama():
        print(f"missing data: SMELT_DATA must name a folder that holds {LLAMA}")
    cells = [{**one, "build": build()} for one in plan(args.quick)]
    found = run_cells("entropy", cell, cells, jobs=1, fresh=args.fresh, seconds=1 if args.quick else 25)
    rows = Rows()
    floats: dict[str, dict[str, Any]] = {}
    symbols: dict[str, dict[str, Any]] = {}
    for one, result in zip(cells, found, strict=True):
        what, name, data = one["what"], NAMES[one["network"]], one.get("data", "")
        if what == "codecs":
            (symbols if data in SYMBOLS else floats)[f"{name} {data}"] = result
        if what == "codecs" and data == "bf16":
            bf16_rows(rows, name, result)
        elif what == "codecs" and data in SYMBOLS:
            symbol_rows(rows, name, data, result)
        elif what == "nncodec":
            nncodec_rows(rows, name, data, result)
        elif what == "levels":
            level_rows(rows, name, result)
        elif what == "kmeans":
            kmeans_rows(rows, name, one["clusters"], result)
        elif what == "threads":
            thread_rows(rows, name, result)
    more = [row for lines in (floats, symbols) for row in table(lines)]
    finish(rows.rows, args.json, more)
    print(f"\nmissed: {len(rows.missed)} of {sum(row.target is not None for row in rows.rows)} targets")
    for text in rows.missed:
        print(f"- {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
