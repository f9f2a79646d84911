"""The report of `dice_core info`: every backend and why it is unavailable if it is, the
instruction-set level of the CPU, the number of threads, and package versions.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import dice_core

from . import backends, threads

PACKAGES = ("numpy", "torch", "jax", "numba", "numba-cuda", "cupy")


def report() -> dict[str, Any]:
    """What this installation can do on this machine."""
    cpu = _cpu()
    parallel = cpu is not None and cpu["openmp"]
    return {
        "dice_core": dice_core.__version__,
        "backends": {
            row.name: {"description": row.description, "unavailable": row.unavailable()}
            for row in backends.table()
        },
        backends.VARIABLE: os.environ.get(backends.VARIABLE),
        "cpu": cpu,
        "threads": {
            "default": threads.resolve(None) if parallel else 1,
            "available_cores": threads.available_cores(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "platform": _platform(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The report as text, one line per fact."""
    lines = [
        f"dice_core {facts['dice_core']} on {facts['platform']}",
        "",
        "backends, in the order tried",
    ]
    automatic = {row.name for row in backends.BUILT_IN if row.automatic}
    for name, row in facts["backends"].items():
        state = "; ".join(row["unavailable"]) or "usable"
        if name not in automatic and state == "usable":
            state = "usable, only if requested by name"
        lines.append(f"  {name:<11} {row['description']:<37} {state}")
    requested = facts[backends.VARIABLE]
    lines.append(f"  {backends.VARIABLE} " + (f"= {requested}" if requested else "is not set"))
    cpu = facts["cpu"]
    lines += ["", "cpu"]
    if cpu is None:
        lines.append("  no compiled kernels")
    else:
        openmp = (
            f"{cpu['openmp']} ({cpu['openmp_library']})"
            if cpu["openmp"]
            else "none: single-threaded"
        )
        lines += [f"  level       {cpu['level']}", f"  OpenMP      {openmp}"]
    count = facts["threads"]
    omp = count["OMP_NUM_THREADS"]
    lines.append(
        f"  threads     {count['default']} by default ({count['available_cores']} cores available, "
        f"OMP_NUM_THREADS {'= ' + omp if omp else 'is not set'})"
    )
    lines += ["", "versions"]
    lines += [
        f"  {name:<12}{version or 'not installed'}" for name, version in facts["versions"].items()
    ]
    return "\n".join(lines)


def _cpu() -> dict[str, Any] | None:
    for row in backends.BUILT_IN:
        if row.device == "cpu" and row.automatic and not row.unavailable():
            kernels = row.load()
            version, library = kernels.openmp()
            return {"level": kernels.LEVEL, "openmp": version, "openmp_library": library}
    return None


def _platform() -> str:
    """As `platform.platform()`, which runs a program, `uname -p`."""
    libc = "".join(platform.libc_ver())
    return "-".join(filter(None, (platform.system(), platform.release(), platform.machine(), libc)))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
