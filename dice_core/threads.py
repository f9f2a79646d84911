"""How many threads a call may use.

The CPU kernels use fewer if there is little work, and one if so many cannot be started or if this
process was forked from one with several threads: those of OpenMP do not survive fork.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from pathlib import Path


def resolve(num_threads: int | None) -> int:
    """`num_threads`, else OMP_NUM_THREADS, else the cores this process may use."""
    if num_threads is None:
        return _omp_num_threads() or available_cores()
    if isinstance(num_threads, bool):
        raise TypeError("num_threads must be an integer, got bool")
    try:
        count = operator.index(num_threads)
    except TypeError:
        raise TypeError(
            f"num_threads must be an integer, got {type(num_threads).__name__}"
        ) from None
    if count < 1:
        raise ValueError(f"num_threads must be at least 1, got {count}")
    return count


def available_cores() -> int:
    """Cores this process may use: its affinity mask, bounded by its control group's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


@functools.cache
def _omp_num_threads() -> int | None:
    """OMP_NUM_THREADS, read once, as OpenMP's own runtime does."""
    # It may list a number per nesting level; ours is the outermost.
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


@functools.cache
def _cgroup_quota(
    root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")
) -> float | None:
    """The smallest CPU quota, in cores, of this process's control group and those above it."""
    quotas = [_quota_v2(root / group) for group in _groups(proc, controller="")]
    quotas += [_quota_v1(root / "cpu" / group) for group in _groups(proc, controller="cpu")]
    return min((quota for quota in quotas if quota), default=None)


def _groups(proc: Path, controller: str) -> list[Path]:
    """The process's group in a hierarchy, relative to its mount, and those above it."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = Path(path.lstrip("/"))
            return [group, *group.parents]
    return []


def _quota_v2(group: Path) -> float | None:
    try:
        limit, period = (group / "cpu.max").read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        limit = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return limit / period if limit > 0 else None
