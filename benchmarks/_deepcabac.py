"""NNCodec's arithmetic coder (DeepCABAC) against ours, in one process of NNCodec's own environment.

    python _deepcabac.py SYMBOLS.npy ZERO CODEBOOK RUNS

SYMBOLS: uint8, or int8; NNCodec codes them minus ZERO, and is told the size of the codebook (0: there is none).
Prints JSON: for each side the bytes and the median CPU seconds of encoding, and of decoding into a given buffer.
Only `smelt.native` is imported of smelt; the rest of it needs more than this environment has.
"""

import importlib.util
import json
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np

package = types.ModuleType("smelt")
package.__path__ = [str(Path(__file__).parent.parent / "src" / "smelt")]
sys.modules["smelt"] = package

from smelt.native.stream import Stream, encode  # noqa: E402

# The compiled module alone: the package around it imports torchvision.
folder = Path(importlib.util.find_spec("nncodec").submodule_search_locations[0]) / "extensions"
spec = importlib.util.spec_from_file_location("deepCABAC", next(folder.glob("deepCABAC*.so")))
cabac = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cabac)

UNARY = 10  # NNCodec's default
OFF = cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8)


def theirs_encode(symbols, book, tuned):
    coder = cabac.Encoder()
    coder.initCtxModels(UNARY + 1, tuned)
    coder.encodeLayer(symbols, 0, 0, int(book[0] > 0), 0, 0, np.zeros(len(symbols), np.int32), *OFF, *book)
    return coder.finish()


def theirs_decode(coded, out, book):
    coder = cabac.Decoder()
    coder.setStream(coded)
    coder.initCtxModels(UNARY + 1)
    coder.decodeLayer(out, 0, 0, int(book[0] > 0), 0, *OFF, *book)
    coder.finish()


def alternate(calls, runs):
    """Medians of CPU seconds, each call in its turn."""
    spent = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, spent, strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return [statistics.median(times) for times in spent]


def main() -> None:
    path, zero, size, runs = sys.argv[1], *map(int, sys.argv[2:])
    codes = np.load(path)
    symbols, ours = codes.astype(np.int32) - zero, codes.view(np.uint8)
    book = (size, zero if size else 0)
    coded = {tuned: theirs_encode(symbols, book, tuned) for tuned in (0, 1)}
    best = min(coded, key=lambda tuned: len(coded[tuned]))
    stream = encode(ours)
    there, here = np.ones_like(symbols), np.ones_like(ours)

    def decode():
        Stream(stream).decode_into(here)

    decoded = alternate([decode, lambda: theirs_decode(coded[best], there, book)], runs)
    if not (np.array_equal(here, ours) and np.array_equal(there, symbols)):
        sys.exit("decoded is not what was encoded")
    encoded = alternate([lambda: encode(ours), lambda: theirs_encode(symbols, book, best)], -(-runs // 3))
    found = {
        side: {"bytes": len(data), "encode": encoded[i], "decode": decoded[i]}
        for i, (side, data) in enumerate([("ours", stream), ("theirs", coded[best])])
    }
    print(json.dumps({**found, "symbols": len(codes), "param_opt": best}))


if __name__ == "__main__":
    main()
