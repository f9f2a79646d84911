"""Memory of this process: how much it has, and how much it had at most."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil

_PROC = Path("/proc/self")


class Meter:
    """Growth of the resident memory since the meter was made, in bytes.

    On Linux the kernel's high-water mark (VmHWM) is set back to the present, so that `peak` is of
    this stretch alone; where it cannot be, the mark is the process's lifetime maximum and `peak`
    may miss what stayed below an earlier one.
    """

    def __init__(self) -> None:
        _give_back_free_memory()
        resettable()
        self._start = _resident()

    def growth(self) -> int:
        """Now."""
        return max(0, _resident() - self._start)

    def peak(self) -> int:
        """At most."""
        return max(0, _high_water() - self._start)


def resettable() -> bool:
    """Sets the high-water mark back to the present; whether this system can."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _high_water() -> int:
    with contextlib.suppress(OSError):
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _give_back_free_memory() -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
