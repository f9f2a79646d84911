"""The CUDA toolkit that compiles the kernels: its version, and how to install another one.

What CUDA 13's linker makes needs a driver for CUDA 13, what CUDA 12's makes runs with both. pip
installs them side by side, and CUDA 13's is then found first.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys

EXTRA = 'pip install "dice_core[gpu-cu{}]"'
LINKERS = ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12")  # pip's packages
# What pip leaves of `gpu-cu13` when it installs `gpu-cu12`
LEFT = (
    "nvidia-nvjitlink",
    "nvidia-nvvm",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
)
UNINSTALL = f"pip uninstall -y {' '.join(LEFT)}"


def version(package: str) -> str | None:
    """The version of a package that pip installed; None if it did not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def linker() -> tuple[int, int] | None:
    """The version of CUDA whose nvJitLink links the kernels; None if there is none.

    The library itself is asked where pip does not know: conda and the system install it otherwise,
    and of two that pip installed one is found first.
    """
    found = [text for package in LINKERS if (text := version(package))]
    if len(found) == 1:
        major, minor = found[0].split(".")[:2]
        return int(major), int(minor)
    return _loaded() if version("cuda-bindings") else None


def _loaded() -> tuple[int, int] | None:
    """The version that the library reports."""
    try:
        from cuda.bindings import nvjitlink

        major, minor = nvjitlink.version()
    except Exception:  # several, of other packages, for a library that is not found
        return None
    return major, minor


def install(driver: int) -> str:
    """The command that installs the compiler for this driver's version of CUDA.

    It is the one of torch's CUDA where torch is imported, which brings libraries of that version.
    """
    of_torch = _torch_cuda()
    return EXTRA.format(12 if min(driver, of_torch or driver) < 13 else 13)


def replace(driver: int) -> str:
    """How to replace a compiler that is newer than the driver."""
    if (_torch_cuda() or driver) > driver:
        return (
            f"make a new environment, with a build of torch for CUDA {driver} (this one is for "
            f"CUDA {_torch_cuda()}): {install(driver)}"
        )
    return f"replace the compiler: {UNINSTALL} && {install(driver)}"


def _torch_cuda() -> int | None:
    """The major version of CUDA that torch was built for, if it is imported and has CUDA."""
    built_for = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None)
    return int(built_for.split(".")[0]) if built_for else None
