"""The measured device: its clock, its memory, its caches."""

from __future__ import annotations

import ctypes
import math
import re
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import psutil
import torch
from torch import Tensor

from .implementations import Inputs, Step

CACHE_MULTIPLE = 4  # inputs this many times as large as the L2 cache are read from memory
HEAD_START = 20_000_000  # clock cycles, about 10 ms, that the host may enqueue work ahead
HOST_STEPS = 10  # enqueued in a row; many more would fill the queue and block the host


class Device:
    """The CPU; base class of other devices."""

    spawn = sys.platform != "linux"  # a fork, where it is safe, saves seconds of imports
    memory_needs_fresh_process = True  # reused freed memory would hide growth

    def inputs(self, x: Tensor, y: Tensor) -> Inputs:
        """The inputs of successive steps."""
        return [(x, y)]

    def seconds(self, step: Step, repeats: int) -> dict[str, float]:
        """The mean time of a step, and of forward and backward if it has both, over `repeats`
        steps.
        """
        steps = [[time.perf_counter() for _ in step()] for _ in range(repeats)]
        return _means([[stop - start for start, stop in pairwise(times)] for times in steps])

    def reset_peak_memory(self) -> None:
        """Resets `peak_memory`. Raises OSError if that is not possible."""
        with suppress(AttributeError):  # only glibc has malloc_trim
            ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, which would hide growth
        Path("/proc/self/clear_refs").write_text("5")

    def memory(self) -> int:
        """Bytes in use."""
        return int(psutil.Process().memory_info().rss)

    def peak_memory(self) -> int:
        """The most bytes in use since `reset_peak_memory`."""
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


class Cuda(Device):
    """An NVIDIA GPU, timed by CUDA events; memory is what torch's allocator has allocated."""

    spawn = True  # CUDA does not survive a fork
    memory_needs_fresh_process = False  # the allocator's counts are exact
    place = "cuda"

    def inputs(self, x: Tensor, y: Tensor) -> Inputs:
        """Copies that together exceed the L2 cache."""
        size = x.nbytes + y.nbytes
        x, y = x.to(self.place), y.to(self.place)
        free, _ = torch.cuda.mem_get_info()
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        copies = max(2, min(math.ceil(CACHE_MULTIPLE * cache / size), free // 3 // size))
        return [(x, y)] + [(x.clone(), y.clone()) for _ in range(1, copies)]

    def seconds(self, step: Step, repeats: int) -> dict[str, float]:
        """The same times on the device, which does not wait for the host, and the time that the
        host needs to enqueue a step.
        """
        torch.cuda._sleep(HEAD_START)
        steps = [[_event() for _ in step()] for _ in range(repeats)]
        torch.cuda.synchronize()
        found = _means([[a.elapsed_time(b) / 1e3 for a, b in pairwise(events)] for events in steps])
        host = super().seconds(step, HOST_STEPS)["step"]
        torch.cuda.synchronize()
        return found | {"host": host}

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def memory(self) -> int:
        return torch.cuda.memory_allocated()

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()


DEVICES = {"cpu": Device(), "cuda": Cuda()}


def _means(steps: list[list[float]]) -> dict[str, float]:
    phases = [fmean(phase) for phase in zip(*steps, strict=True)]
    names = ("forward", "backward") if len(phases) == 2 else ()
    return {"step": sum(phases)} | dict(zip(names, phases, strict=False))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
