"""The simulated GPU of `gpu_simulator` with the kernels that a driver gets: their PTX, executed."""

import functools
from collections import Counter
from typing import ClassVar

import gpu_simulator
import ptx
import pytest
from emulated import memory

from dice_core.gpu import compile as compiler
from dice_core.gpu import plan as plans
from dice_core.gpu.plan import Plan


@functools.cache
def text(kind: str, plan: Plan, threads: int) -> str:
    """The PTX of a kernel for blocks of this many threads, those now set in `plans`."""
    assert threads == plans.THREADS
    return compiler.ptx(kind, plan, compiler.NEWEST)


@functools.cache
def loaded(source: str) -> ptx.Kernel:
    return ptx.Kernel(source)


class Kernel(gpu_simulator.Kernel):
    """Replaces `driver.Kernel`; its launches execute PTX, before they return."""

    noise: ClassVar[int | None] = None  # of `ptx.launch`
    executed: ClassVar[Counter[str]] = Counter()  # instructions by opcode and lane, since `install`

    def __init__(self, kind: str, plan: Plan, capability: tuple[int, int]) -> None:
        super().__init__(kind, plan, capability)
        self.code = loaded(self.changed(text(kind, plan, plans.THREADS)))

    def changed(self, source: str) -> str:
        """The PTX to execute; a test may replace it."""
        return source

    def launch(
        self, device: int, stream: int, blocks: int, threads: int, parameters: bytes
    ) -> None:
        gpu_simulator.Kernel.launched += (self.kind,)
        Kernel.executed += ptx.launch(
            self.code,
            blocks,
            threads,
            parameters,
            dict(memory.LIVE),
            seed=len(gpu_simulator.Kernel.launched),
            noise=self.noise,
        )


def install(monkeypatch: pytest.MonkeyPatch, warps: int = 2) -> None:
    gpu_simulator.install(monkeypatch, Kernel, warps)
    monkeypatch.setattr(Kernel, "executed", Counter())
