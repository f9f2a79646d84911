"""What depends on the device that is measured: its clock, its memory, its caches, what it is.

Two classes with the same members, and one way through everything else.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from . import memory
from .implementations import Inputs, Step

CACHES = 4  # inputs of so many times the L2 cache leave nothing in it from one turn to the next
HEAD_START = 20_000_000  # clock cycles, about 10 ms: how far the host gets ahead of the device
HOST_STEPS = 10  # enqueued in a row; many more would fill the queue, and the host would wait


class Cpu:
    """The host: its clock, and the resident memory of the process."""

    # A fork has the libraries that its parent imported, which saves seconds; the parent never runs
    # any of them, so there are no threads to lose. Elsewhere forks are absent or unsafe.
    spawn = sys.platform != "linux"
    weighs_apart = True  # a process must be new for its growth to be that of a step
    packages = ()

    def unusable(self) -> str | None:
        """Why nothing can be measured, with the remedy; None if it can."""
        return None

    def facts(self) -> dict[str, Any]:
        """What it is."""
        return {"peak_memory_exact": memory.resettable()}

    def inputs(self, x: Tensor, y: Tensor) -> Inputs:
        """What the steps of a measurement take in turns."""
        return [(x, y)]

    def seconds(self, step: Step, repeats: int) -> list[float]:
        """Of each phase, the mean of so many steps; what readies the input is not timed."""
        runs = [[time.perf_counter() for _ in step()] for _ in range(repeats)]
        return _means([[stop - start for start, stop in pairwise(marks)] for marks in runs])

    def host_seconds(self, step: Step) -> float | None:
        """What a step costs the host, None if that is its time."""
        return None

    def meter(self) -> memory.Meter | DeviceMeter:
        """`growth` and `peak` since now, in bytes."""
        return memory.Meter()


class Cuda:
    """An NVIDIA GPU: events in its queue, and what torch's allocator has handed out."""

    spawn = True  # a fork of a process that has so much as counted its GPUs cannot use them
    weighs_apart = False  # the allocator's counts are of every byte, whatever was there before
    packages = ("triton", "numba", "numba-cuda", "exacta")
    place = "cuda"  # in torch's words

    def unusable(self) -> str | None:
        """Why nothing can be measured, with the remedy; None if it can."""
        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is built without CUDA; "
                f"https://pytorch.org/get-started has builds with it"
            )
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU; see whether `nvidia-smi` and CUDA_VISIBLE_DEVICES do"
        return None

    def facts(self) -> dict[str, Any]:
        """What it is."""
        about = _properties()
        return {
            "peak_memory_exact": True,
            "gpu": about.name,
            "compute_capability": f"{about.major}.{about.minor}",
            "gpu_memory_bytes": about.total_memory,
            "l2_bytes": about.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }

    def inputs(self, x: Tensor, y: Tensor) -> Inputs:
        """What the steps of a measurement take in turns: copies that no cache holds together."""
        size = x.nbytes + y.nbytes
        x, y = x.to(self.place), y.to(self.place)
        free, _ = torch.cuda.mem_get_info()
        wanted = math.ceil(CACHES * _properties().L2_cache_size / size)
        copies = max(2, min(wanted, free // 3 // size))
        return [(x, y)] + [(x.clone(), y.clone()) for _ in range(1, copies)]

    def seconds(self, step: Step, repeats: int) -> list[float]:
        """Of each phase, the mean of so many steps, none of which waits for the host."""
        torch.cuda._sleep(HEAD_START)
        runs = [[_mark() for _ in step()] for _ in range(repeats)]
        torch.cuda.synchronize()
        return _means([[a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)] for marks in runs])

    def host_seconds(self, step: Step) -> float | None:
        """What a step costs the host: the time to enqueue it."""
        torch.cuda.synchronize()
        phases = DEVICES["cpu"].seconds(step, HOST_STEPS)
        torch.cuda.synchronize()
        return sum(phases)

    def meter(self) -> memory.Meter | DeviceMeter:
        """`growth` and `peak` since now, in bytes."""
        return DeviceMeter()


class DeviceMeter:
    """`memory.Meter` for what torch's allocator hands out of the device's memory."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._start = torch.cuda.memory_allocated()

    def growth(self) -> int:
        """Now."""
        return torch.cuda.memory_allocated() - self._start

    def peak(self) -> int:
        """At most."""
        return torch.cuda.max_memory_allocated() - self._start


Device = Cpu | Cuda
DEVICES: dict[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}


def _means(runs: list[list[float]]) -> list[float]:
    return [fmean(phase) for phase in zip(*runs, strict=True)]


def _properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30)
        return answer.stdout.split()[0]
    return None
