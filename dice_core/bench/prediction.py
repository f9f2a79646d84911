"""How long the CUDA kernels should take, from their machine code: a roofline, without a GPU.

A launch takes at least the time of each of these, and the prediction is the longest of them:

- memory: the bytes that it must move, at the bandwidth of a copy;
- issue: its instructions, one of a warp per cycle from each of the four schedulers;
- ALU, FMA, MUFU: its instructions for one kind of execution unit, at the lanes that there are.

To that comes LAUNCH seconds per launch. The instructions are those of `machine_code`: rounds of the
loop over voxels, and what is before and after that loop in every block.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _gpu
from ..buffers import Layout
from ..gpu import plan as plans
from ..spec import Spec
from . import tables
from .cases import Case
from .implementations import IMPLEMENTATIONS
from .machine_code import Compiled, compiled, count

LAUNCH = 1e-6  # s that a queued launch adds: about 0.9 in NVIDIA's blog on CUDA graphs (2019)
SCHEDULERS = 4  # per multiprocessor
ROWS = {"ours": "Dice", "ours-ce": "Dice + CE", "ours-focal": "Dice + focal"}
DEFAULT_ROWS = ("ours", "ours-ce")
ITEMSIZE = {"int64": 8, "uint8": 1}  # of labels

# The execution unit of an instruction. ALU: integers without multiplication, comparisons,
# selection, minimum, maximum, moves. MUFU: exponential, logarithm and reciprocal, and conversions
# to and from integers and 64 bits. Nsight Compute's kernel profiling guide, "Pipelines".
UNITS = {
    "ALU": r"(?:FMNMX|FSETP?|FSEL|SEL|ISETP|IADD|VIADD|VIMNMX|IMNMX|IABS|LOP3|PLOP3|LEA|PRMT|SHF"
    r"|SGXT|BMSK|MOV|P2R|R2P|F2FP)\b",
    "FMA": r"(?:FADD|FMUL|FFMA|IMAD)\b",
    "MUFU": r"(?:MUFU|I2F|F2I|F2F|FRND)\b",
}


@dataclass(frozen=True)
class Gpu:
    """The constants of a GPU.

    - clock: of the multiprocessors, in Hz, under such a load: an assumption.
    - copy: bandwidth of a copy, bytes read and written, per second: an assumption.
    - lanes: of an execution unit, per multiprocessor and cycle; those of ALU and FMA are the rates
      of 32-bit comparisons and additions, and of float32 arithmetic.
    - shared_bytes: shared memory per multiprocessor.
    """

    title: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    copy: float
    lanes: Mapping[str, int]
    shared_bytes: int
    registers: int = 65536
    warps: int = 64

    def __str__(self) -> str:
        units = ", ".join(f"{unit} {lanes}" for unit, lanes in self.lanes.items())
        return (
            f"{self.title}: compute capability {self.capability[0]}.{self.capability[1]}, "
            f"{self.multiprocessors} multiprocessors at {self.clock / 1e9:.2f} GHz, lanes of "
            f"each: {units}; copy {self.copy / 1e12:.2f} TB/s"
        )

    def resident_warps(self, kernel: Compiled) -> int:
        """Warps of a kernel that a multiprocessor holds at a time."""
        registers = -(-32 * kernel.registers // 256) * 256  # of a warp, allocated 256 at a time
        shared = kernel.shared_bytes + 1024  # which the system keeps of each block
        blocks = min(
            self.registers // (registers * plans.WARPS),
            self.shared_bytes // shared,
            self.warps // plans.WARPS,
        )
        return blocks * plans.WARPS

    def seconds(self, work: Work) -> dict[str, float]:
        """The time of each limit alone."""
        share = -(-work.blocks // self.multiprocessors) / work.blocks  # of the busiest
        cycles = {"issue": share * work.instructions("") / SCHEDULERS}
        for unit, pattern in UNITS.items():
            cycles[unit] = share * work.instructions(pattern) * plans.WARP / self.lanes[unit]
        return {"memory": work.bytes / self.copy} | {k: n / self.clock for k, n in cycles.items()}


# Multiprocessors, memory and clocks: NVIDIA's white papers and data sheets of the H100, H200 and
# A100. Peak bandwidths are 3.35, 4.8 and 2.04 TB/s, of which copies reach about nine tenths; the
# H100's and H200's highest clock is 1.98 GHz, which they hold for light loads only. Lanes: CUDA C++
# Programming Guide, "Throughput of native arithmetic instructions". Shared memory: the same,
# "Technical specifications per compute capability".
_HOPPER = {"ALU": 64, "FMA": 128, "MUFU": 16}
_AMPERE = {"ALU": 64, "FMA": 64, "MUFU": 16}
GPUS = {
    "h100": Gpu("H100 SXM", (9, 0), 132, 1.7e9, 3.0e12, _HOPPER, 228 << 10),
    "h200": Gpu("H200 SXM", (9, 0), 132, 1.7e9, 4.3e12, _HOPPER, 228 << 10),
    "a100": Gpu("A100 SXM 80 GB", (8, 0), 108, 1.4e9, 1.75e12, _AMPERE, 164 << 10),
}


@dataclass(frozen=True)
class Work:
    """What the launches of a pass do: the kernel over voxels and, forward, that of the totals.

    - bytes: that it moves at least, logits and labels once, and the gradient.
    - rounds: of the loop over voxels, of all warps together.
    """

    kernel: Compiled
    bytes: int
    blocks: int
    rounds: int

    @property
    def launches(self) -> int:
        """Forward adds the partial sums in a second one."""
        return 1 if self.kernel.kind == "gradient" else 2

    def instructions(self, pattern: str) -> float:
        """Instructions of all warps whose name starts with this pattern."""
        of_round, fixed = self.counts(pattern)
        return self.rounds * of_round + self.blocks * plans.WARPS * fixed

    def counts(self, pattern: str) -> tuple[int, int]:
        """Those of a warp: in a round of the loop, and outside."""
        return count(self.kernel.round, pattern), count(self.kernel.fixed, pattern)


@dataclass(frozen=True)
class Prediction:
    """The predicted times of a pass on a GPU."""

    gpu: Gpu
    work: Work

    @functools.cached_property
    def limits(self) -> dict[str, float]:
        """The time of each limit alone, in seconds."""
        return self.gpu.seconds(self.work)

    @property
    def limit(self) -> str:
        """The name of the longest."""
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def seconds(self) -> float:
        """The predicted time, with launches."""
        return max(self.limits.values()) + LAUNCH * self.work.launches

    @property
    def of_copy(self) -> float:
        """That time divided by the time of a copy of as many bytes, a single launch."""
        return self.seconds / (self.limits["memory"] + LAUNCH)


def works(
    cases: Iterable[Case], rows: Sequence[str], labels: str, capability: tuple[int, int]
) -> dict[str, Work]:
    """The passes of these cases and rows of ROWS, by their titles."""
    found = {}
    for case in cases:
        for row in rows:
            spec = IMPLEMENTATIONS[row].build(case.shape[1]).spec("softmax", None)
            x, y = layouts(case, labels)
            at = job(x, y, spec)
            for title, kind in (("forward", "statistics"), ("gradient", "gradient")):
                kernel = _compiled(kind, at.plan, capability)
                found[f"{case.name} {ROWS[row]}, {title}"] = work(kernel, x, y, at)
    return found


def job(x: Layout, y: Layout, spec: Spec) -> Any:
    """The plan and the launches of the backend for aligned logits and labels."""
    return _gpu._job(x, y, x, spec, (0, 0, 0))


def work(kernel: Compiled, x: Layout, y: Layout, job: Any) -> Work:
    """What the launches for such logits and labels do."""
    logits, of_labels = (math.prod(array.shape) * array.itemsize for array in (x, y))
    run, step = job.geometry["run"], kernel.plan.step
    last = job.voxels - (job.runs - 1) * run
    rounds = job.samples * ((job.runs - 1) * -(-run // step) + -(-last // step)) * plans.WARPS
    passes = 2 if kernel.kind == "gradient" else 1  # over the logits: read, written
    return Work(kernel, passes * logits + of_labels, job.blocks, rounds)


def layouts(case: Case, labels: str) -> tuple[Layout, Layout]:
    """The layouts of a case's logits and labels on a GPU."""
    samples, channels, *sides = case.shape
    voxels = math.prod(sides)
    size = plans.ITEMSIZE[case.dtype]
    between = (1, channels) if case.channels_last else (voxels, 1)  # channels, voxels
    inner = _strides(sides)
    x = (channels * voxels, between[0], *(step * between[1] for step in inner))
    y = (voxels, *inner)
    return (
        Layout(case.shape, tuple(size * step for step in x), case.dtype, size, "cuda:0"),
        Layout(
            (samples, *sides),
            tuple(ITEMSIZE[labels] * step for step in y),
            labels,
            ITEMSIZE[labels],
            "cuda:0",
        ),
    )


def _strides(sides: Sequence[int]) -> list[int]:
    return [math.prod(sides[axis + 1 :]) for axis in range(len(sides))]


@functools.cache
def _compiled(kind: str, plan: Any, capability: tuple[int, int]) -> Compiled:
    number = ".".join(map(str, capability))
    print(
        f"compiling {kind} for {number}: {plan.logits}, {plan.channels} channels, "
        f"{plan.labels} labels, {plan.voxels} voxels and {plan.lanes} lanes a thread",
        file=sys.stderr,
        flush=True,
    )
    return compiled(kind, plan, capability)


LEGEND = f"""\
A prediction, not a measurement: nothing has run. A row is a pass over the logits: forward, which is
two launches, or the gradient, one. 'us' is the longest of the times in the columns memory, issue,
ALU, FMA and MUFU, which 'limit' names, and {LAUNCH * 1e6:g} us for each launch. '/ copy' is 'us'
divided by the time of a copy of as many bytes, with its launch.

C: channels. V: voxels that a thread loads at once. lanes: that share a voxel. regs: registers of a
thread. warps: on a multiprocessor at a time, of 64. local: bytes of local memory of a thread, 0
unless registers are spilled. MB: logits and labels read once, and the gradient written. instr:
instructions in the loop over voxels, per class and voxel. MUFU: those of them that are
exponentials, logarithms, reciprocals or conversions. fixed: instructions of a warp outside that
loop, by the longest way: too many where an unrolled loop is not entered. ALU: integers,
comparisons, selection. FMA: float32 arithmetic, integer products. Issue and units are those of the
multiprocessor with the most blocks.

Labels are taken to be valid: a branch counts with its longer side, that of a valid label. Where
some lanes of a warp have a valid label and others an ignored one, both sides are executed.

What the model leaves out makes kernels slower, but for the caches:

- latencies: memory, issue and units overlap perfectly in it, which needs enough warps, and none of
  them waits for a dependent instruction, a barrier or a bank of shared memory;
- what the second launch of forward does: a chain of loads of the partial sums;
- loops outside the loop over voxels, which count as one round;
- memory that is not kept busy while the last blocks run, or by few blocks;
- clocks other than the assumed one;
- the L2 cache, which may hold the inputs of small cases (the benchmark takes several in turn);
- torch's operations on the (N, C) sums, for losses other than Dice alone, and the host.
"""


def report(cases: Sequence[Case], rows: Sequence[str], labels: str, gpus: Sequence[str]) -> str:
    """The tables of all passes, one per GPU."""
    parts = []
    for name in gpus:
        gpu = GPUS[name]
        found = works(cases, rows, labels, gpu.capability)
        predictions = {title: Prediction(gpu, each) for title, each in found.items()}
        parts.append(tables.table(f"{gpu}; {labels} labels", predictions, COLUMNS))
    return "\n\n".join([*parts, LEGEND])


def _of_limit(name: str) -> Callable[[Prediction], str]:
    return lambda p: _number(1e6 * p.limits[name])


def _number(value: float) -> str:
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


COLUMNS: dict[str, Callable[[Prediction], str]] = {
    "logits": lambda p: p.work.kernel.plan.logits,
    "C": lambda p: str(p.work.kernel.plan.channels),
    "V": lambda p: str(p.work.kernel.plan.voxels),
    "lanes": lambda p: str(p.work.kernel.plan.lanes),
    "regs": lambda p: str(p.work.kernel.registers),
    "warps": lambda p: str(p.gpu.resident_warps(p.work.kernel)),
    "local": lambda p: str(p.work.kernel.local_bytes),
    "MB": lambda p: _number(p.work.bytes / 1e6),
    "blocks": lambda p: str(p.work.blocks),
    "instr": lambda p: _number(p.work.counts("")[0] / p.work.kernel.values),
    "MUFU": lambda p: _number(p.work.counts(UNITS["MUFU"])[0] / p.work.kernel.values),
    "fixed": lambda p: str(p.work.counts("")[1]),
    **{f"{name} us": _of_limit(name) for name in ("memory", "issue", *UNITS)},
    "limit": lambda p: p.limit,
    "us": lambda p: _number(1e6 * p.seconds),
    "/ copy": lambda p: _number(p.of_copy),
}
