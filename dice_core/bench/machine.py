"""The machine, settings and versions of a run, as text."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from .. import backends, threads
from .measure import Settings

PACKAGES = ["dice_core", "numpy", "torch", "triton", "numba-cuda"]
PACKAGES += [
    "monai",
    "nnunetv2",
    "dynamic-network-architectures",
    "segmentation-models-pytorch",
    "kornia",
]
# They affect the cost of allocation, and where threads run and how they wait.
VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)


def facts(settings: Settings) -> dict[str, str]:
    """Hardware, settings, versions, environment, date and command."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    found = {"processor": f"{_processor()}, {threads.available_cores()} cores, {memory}"}
    if settings.device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["GPU"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.L2_cache_size / 2**20:.0f} MiB of L2 cache, "
            f"CUDA {torch.version.cuda}"
        )
    backend = os.environ.get(backends.VARIABLE) or _backend(settings.device)
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    load = f"load {psutil.getloadavg()[0]:.1f} at the start"
    return found | {
        "settings": f"backend {backend}, {settings.threads} threads, {settings.labels} labels",
        "versions": ", ".join(
            filter(None, [f"python {platform.python_version()}", *map(_version, PACKAGES)])
        ),
        "environment": ", ".join(variables) or "the allocator's and OpenMP's defaults",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {load}",
        "command": shlex.join(["python", "-m", "dice_core.bench", *sys.argv[1:]]),
    }


def _processor() -> str:
    """The model name, from Linux if available."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _backend(device: str) -> str | None:
    rows = (row for row in backends.BUILT_IN if row.device == device and row.automatic)
    return next((row.name for row in rows if not row.unavailable()), None)


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None
