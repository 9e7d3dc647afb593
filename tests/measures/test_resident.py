"""Memory as the operating system counts it, in processes that have done nothing else."""

import subprocess
import sys

SIZE = 60_000_000


def grown(work: str) -> int:
    """Bytes by which a fresh process grows while a function of this text runs."""
    text = f"import numpy as np\nfrom smelt.measures.resident import resident\nn = {SIZE}\nprint(resident({work}))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_is_touched_counts_and_what_is_not_does_not() -> None:
    assert 0.9 * SIZE < grown("lambda: np.ones(n, np.uint8)") < 1.5 * SIZE
    assert grown("lambda: np.empty(n, np.uint8)") < 0.5 * SIZE


def test_a_peak_counts_that_is_gone_again() -> None:
    assert grown("lambda: [np.ones(n // 2, np.uint8) for _ in range(2)].clear()") > 0.9 * SIZE
