"""Compiled kernels on disk, so that only the first process that needs one imports numba.

A file holds a digest and a cubin. Its name is a hash of everything that the cubin depends on, so no
file is ever out of date; the folder can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

from .plan import Plan

VARIABLE = "DICE_CORE_CACHE_DIR"
SOURCES = (  # relative to this file
    "../spec.py",
    "plan.py",
    "kernels.py",
    "blocks.py",
    "general.py",
    "totals.py",
    "intrinsics.py",
    "compile.py",
)
COMPILERS = (
    "numba",
    "numba-cuda",
    "llvmlite",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink-cu12",
)
DIGEST_BYTES = 32


def cubin(kind: str, plan: Plan, capability: tuple[int, int]) -> bytes:
    """The cubin of a kernel: from the disk if it is there and intact, else compiled and stored.

    Without a writable folder every process compiles it.
    """
    path, stored = None, b""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        path = folder() / f"{_key(kind, plan, capability)}.cubin"
        stored = path.read_bytes()
    code = stored[DIGEST_BYTES:]
    if code and hashlib.sha256(code).digest() == stored[:DIGEST_BYTES]:
        return code

    from . import compile as compiler  # numba takes a second to import

    code = compiler.compile(kind, plan, capability)
    if path is not None:
        with contextlib.suppress(OSError):
            _write(path, hashlib.sha256(code).digest() + code)
    return code


def folder() -> Path:
    """DICE_CORE_CACHE_DIR, else dice_core in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dice_core"


def _key(kind: str, plan: Plan, capability: tuple[int, int]) -> str:
    return hashlib.sha256(repr((kind, plan, capability, _origin())).encode()).hexdigest()


@functools.cache
def _origin() -> tuple[str, ...]:
    """The dependencies of all kernels: digests of the sources, and the compilers' versions."""
    here = Path(__file__).parent
    texts = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in SOURCES]
    return (*texts, *(str(version(package)) for package in COMPILERS))


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not, as a system-wide compiler is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Atomically: other processes see all of the file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".new")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
