"""Bodies that fuzzing found worth keeping (fuzz/corpus.py): each gives the same elements, or is refused, everywhere."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smelt import native
from smelt.native.portable import decode_chunk

CORPUS = Path(__file__).parent / "corpus"
INDEX: dict[str, dict[str, Any]] = json.loads((CORPUS / "index.json").read_text())
GUARD = 64  # bytes behind the elements


def body(name: str) -> bytes:
    return (CORPUS / f"{name}.body").read_bytes()


def test_the_index_is_complete() -> None:
    assert {path.stem for path in CORPUS.glob("*.body")} == set(INDEX)
    assert sum(entry["sha256"] is None for entry in INDEX.values()) >= 40


@pytest.mark.parametrize("name", INDEX)
def test_numpy(name: str) -> None:
    entry = INDEX[name]
    if entry["sha256"] is None:
        with pytest.raises(ValueError):
            decode_chunk(body(name), entry["count"], entry["width"])
    else:
        found = decode_chunk(body(name), entry["count"], entry["width"])
        assert found.dtype == f"u{entry['width']}"
        assert hashlib.sha256(found.tobytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("level", range(3))
def test_library(level: int) -> None:
    library = native.library()
    if library is None or not hasattr(library, "smelt_chunk_decode"):
        pytest.skip("the C library is not built")
    if level > library.smelt_best_level():
        pytest.skip("this machine has no such instructions")
    for name, entry in INDEX.items():
        size = entry["count"] * entry["width"]
        data, out = np.frombuffer(body(name), np.uint8), np.full(size + GUARD, 0xA5, np.uint8)
        at, to = data.ctypes.data, out.ctypes.data
        result = library.smelt_chunk_decode(at, len(data), to, entry["count"], entry["width"], level)
        assert result == (0 if entry["sha256"] else -1), name
        assert (out[size:] == 0xA5).all(), name
        if entry["sha256"]:
            assert hashlib.sha256(out[:size].tobytes()).hexdigest() == entry["sha256"], name
