"""Puts the emulated GPU in the place of a real one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import emulated
from dice_core import _gpu, backends
from dice_core.gpu import cache, driver
from dice_core.gpu import compile as compiler
from dice_core.torch import functional, operators

from .driver import Library, ctypes_with, with_source
from .tensors import Devices, is_plain

LIBRARY = Library()
# The caches of the package, of which those for the emulated device are kept from test to test.
_KEPT = {
    (module, name): functools.cache(getattr(module, name).__wrapped__)
    for module, names in {
        driver: ("_driver", "_context", "_handle", "capability", "name"),
        _gpu: ("_kernel",),
        backends: ("_unavailable", "_named", "_first"),
    }.items()
    for name in names
}
_JOBS = functools.lru_cache(1024)(_gpu._Job)


@contextmanager
def installed(folder: Path) -> Iterator[Library]:
    """The emulated device is device 0; the folder is for compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulated, "active", True)
        patch.setenv(cache.VARIABLE, str(folder))
        patch.setattr(driver, "ctypes", ctypes_with(LIBRARY))
        patch.setattr(compiler, "link", with_source(compiler.link))
        for (module, name), function in _KEPT.items():
            patch.setattr(module, name, function)
        patch.setattr(_gpu, "_job", _JOBS)
        plain = is_plain(operators.is_plain)
        for module in (operators, functional):
            patch.setattr(module, "is_plain", plain)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with Devices():
            yield LIBRARY
    assert not LIBRARY.leaked_events
