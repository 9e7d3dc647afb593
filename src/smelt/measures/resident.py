"""Bytes of physical memory that work takes, as the operating system counts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNIT = "bytes"
STATUS = Path("/proc/self/status")


def resident(work: Callable[[], Any]) -> int | None:
    """Bytes by which this process grows at most while `work` runs, libraries that it loads included.

    Meant for a process of its own that has done nothing else: what was used and freed before is used again, and does
    not count.  None where the system does not tell (neither Linux nor another Unix).
    """
    before = _reset()
    if before is None:
        return None
    work()
    peak = _peak()
    return None if peak is None else max(0, peak - before)


def _reset() -> int | None:
    """Bytes in use now; from here on the peak is counted, where it can be set back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int | None:
    if STATUS.exists():
        return _status("VmHWM")
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _status(key: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
