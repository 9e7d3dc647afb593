"""A few hundred of the files of fuzz/files.py, in a process of its own: it limits its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as Linux does")
def test_nothing_but_smelt_errors() -> None:
    command = [sys.executable, str(ROOT / "fuzz/files.py"), "--count", "400", "--seed", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert ", 0 wrong" in done.stdout
