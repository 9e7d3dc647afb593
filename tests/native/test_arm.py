"""The NEON decoder gives what every other one gives: run under emulation, where a cross compiler and QEMU are there."""

import hashlib
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from smelt import native
from smelt.native.portable import decode_chunk

from .test_corpus import CORPUS, INDEX, body

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
SOURCES = Path(native.__file__).parent


@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="no cross compiler or no emulator")
def test_neon(tmp_path: Path) -> None:
    sources = [str(path) for path in SOURCES.glob("*.c") if path.stem != "module"]
    program = tmp_path / "levels"
    command = [
        COMPILER,
        "-O2",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-static",
        f"-I{SOURCES}",
        "-o",
        str(program),
    ]
    subprocess.run([*command, str(Path(__file__).with_name("levels.c")), *sources], check=True)
    lines = "".join(f"{e['width']} {e['count']} {CORPUS / name}.body\n" for name, e in INDEX.items())
    done = subprocess.run([EMULATOR, str(program)], input=lines, capture_output=True, text=True, check=True)
    found = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == len(INDEX)
    library = native.coder()
    for (name, entry), (portable, crc, neon, neon_crc, size, coded) in zip(INDEX.items(), found, strict=True):
        assert (portable, crc) == (neon, neon_crc) and (neon == 0) == (entry["sha256"] is not None), name
        if neon:
            continue
        elements = decode_chunk(body(name), entry["count"], entry["width"])
        assert (
            zlib.crc32(elements.tobytes()) == crc and hashlib.sha256(elements.tobytes()).hexdigest() == entry["sha256"]
        )
        if library is not None:
            out = np.empty(elements.nbytes + 1, np.uint8)
            own = library.smelt_chunk_encode(
                elements.ctypes.data, elements.size, entry["width"], 0, 0, out.ctypes.data, out.size
            )
            assert (own, zlib.crc32(out[:own])) == (size, coded), name
