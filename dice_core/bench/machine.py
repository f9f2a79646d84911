"""Where and with what a run was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil

from .. import backends, threads
from .device import DEVICES

PACKAGES = (
    "dice_core",
    "numpy",
    "torch",
    "monai",
    "nnunetv2",
    "segmentation-models-pytorch",
    "kornia",
)
# They decide what a fresh tensor costs, and where threads run.
VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")


def facts(device: str) -> dict[str, Any]:
    """Processor, memory, the backend that a call gets, environment, versions, date, command; and
    what the device says of itself.
    """
    about = DEVICES[device]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "dice_core.bench", *sys.argv[1:]]),
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": threads.available_cores(),
        "load": psutil.getloadavg()[0],  # how busy others keep it
        "memory_bytes": psutil.virtual_memory().total,
        "backend": _backend(device),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "versions": {"python": platform.python_version()}
        | {name: found for name in (*PACKAGES, *about.packages) if (found := _version(name))},
    } | about.facts()


def processor() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _backend(device: str) -> str | None:
    usable = (
        row.name
        for row in backends.BUILT_IN
        if row.device == device and row.automatic and not row.unavailable()
    )
    return os.environ.get(backends.VARIABLE) or next(usable, None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
