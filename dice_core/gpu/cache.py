"""Compiled kernels on disk, so that only the first process that needs one imports numba.

A file holds a digest and a cubin. Its name is a hash of everything that the cubin is known to
depend on; one that the driver still cannot load is replaced. The folder can be deleted at any time.

A cubin is code, so none is read that another user may have written: the folder and the file must
belong to this user or to root, and nobody else may write to them. The folders above are not
checked: who may write to one of them could only put another file of this user's in our file's
place, and its digest, which includes the name, would be wrong. Windows has no such modes; there the
default, in the user's profile, is private.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from . import driver, toolkit
from .plan import Plan

VARIABLE = "DICE_CORE_CACHE_DIR"
SOURCES = (  # relative to this file
    "../spec.py",
    "plan.py",
    "kernels.py",
    "blocks.py",
    "general.py",
    "plain.py",
    "totals.py",
    "intrinsics.py",
    "compile.py",
)
COMPILERS = (  # pip's packages; of a toolkit from elsewhere only the linker's version is known
    "numba",
    "numba-cuda",
    "llvmlite",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
    "nvidia-cuda-nvrtc",  # numba-cuda compiles for the architecture nearest to those that it knows
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink-cu12",
    "nvidia-cuda-nvrtc-cu12",
)
DIGEST_BYTES = 32
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# A symbolic link is refused, and a pipe does not block.
READ = os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "BINARY"))
WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def cubin(kind: str, plan: Plan, capability: tuple[int, int]) -> bytes:
    """The cubin of a kernel: from the disk if it is there, intact and of an ABI that the driver
    accepts, else compiled and stored.

    Without a private, writable folder every process compiles it, and a RuntimeWarning says why.
    """
    key = _key(kind, plan, capability)
    path, code = None, b""
    with _warning():
        path = _private(folder()) / f"{key}.cubin"
        code = _read(path, key)
    if code and driver.accepts(code, capability):
        return code

    from . import compile as compiler  # numba takes a second to import

    code = compiler.compile(kind, plan, capability)
    if path is not None:
        with _warning():
            _write(path, _digest(key, code) + code)
    return code


def folder() -> Path:
    """DICE_CORE_CACHE_DIR, else dice_core in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(base):  # to be ignored, by the specification
            base = Path.home() / ".cache"
    return Path(base) / "dice_core"


def _key(kind: str, plan: Plan, capability: tuple[int, int]) -> str:
    return hashlib.sha256(repr((kind, plan, capability, _origin())).encode()).hexdigest()


@functools.cache
def _origin() -> tuple[str, ...]:
    """The dependencies of all kernels: digests of the sources, and the compilers' versions."""
    here = Path(__file__).parent
    texts = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in SOURCES]
    python = str(sys.implementation.cache_tag)  # whose bytecode numba compiles
    versions = (toolkit.linker(), *(toolkit.version(package) for package in COMPILERS))
    return (*texts, python, *map(str, versions))


def _private(path: Path) -> Path:
    """The folder, made if it is not there; PermissionError if others may write to it."""
    os.makedirs(path, 0o700, exist_ok=True)
    status = os.lstat(path)
    reason = _exposed(status) if stat.S_ISDIR(status.st_mode) else "is not a folder but a link"
    if reason:
        raise PermissionError(f"{path} {reason}")
    return path


def _exposed(status: os.stat_result) -> str:
    """Why others may have written a folder or file with this owner and mode; empty if not."""
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (uid {status.st_uid}, not {os.geteuid()})"
    return "can be written to by others (chmod go-w)" if status.st_mode & OTHERS_WRITE else ""


def _read(path: Path, key: str) -> bytes:
    """The cubin in a file; empty if it is missing, damaged or may have been written by others: it
    is then replaced.
    """
    try:
        handle = os.open(path, READ)
    except OSError:
        return b""
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or _exposed(status):
            return b""
        content = file.read()
    code = content[DIGEST_BYTES:]
    return code if code and content[:DIGEST_BYTES] == _digest(key, code) else b""


def _digest(key: str, code: bytes) -> bytes:
    """Of the key too, so that a file is never read under another name."""
    return hashlib.sha256(key.encode() + code).digest()


def _write(path: Path, content: bytes) -> None:
    """Atomically: other processes see all of the file or none. Others may read it if the umask lets
    them, and never write to it.
    """
    name = path.with_suffix(f".{secrets.token_hex(8)}.new")
    handle = os.open(name, WRITE, 0o644)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _warning() -> Iterator[None]:
    """Turns a failure of the disk into a warning, once for each cause."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _warn(str(error))


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"compiled CUDA kernels are not kept on disk: {reason}; set {VARIABLE} to a folder that "
        f"only you can write to",
        RuntimeWarning,
        stacklevel=2,
    )
