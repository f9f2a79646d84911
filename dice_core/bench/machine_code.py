"""The machine code of the CUDA kernels, read without a GPU: instructions, loops, the way of a warp.

A kernel is a straight start, one loop over voxels (the hot loop) and a straight end, with a few
branches and short loops in each. The hot loop loads each logit of the plan or, the gradient also
having a loop that loads the cotangent, stores each.

The way of a warp between two instructions is the longest one without a jump back: where the code
branches, a warp takes one side, and the longer one is counted. Of a voxel that is nearly always the
side of a valid label, the other being that of ignored and out-of-range labels. So a warp with
labels of both kinds executes more than this way, and one with ignored labels alone less. An
instruction whose predicate is false counts, since it is issued. What lies after the last
unconditional EXIT does not: shuffles of threads that have diverged, which never happens.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..gpu import compile as compiler
from ..gpu import kernels
from ..gpu.plan import Plan

INSTALL = "pip install 'nvidia-cuda-nvdisasm>=13,<14'"
_GUARD = r"(?:@!?U?P(?:T|\d+) )?"
_SECTION = re.compile(r"\s*\.section\s+\.text\.(\w+)")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(rf"({_GUARD})BRA(\S*) (.*)`\((\.L_x_\d+)\)")
_END = re.compile(r"(EXIT|RET|BRX|JMP)\b")


@functools.cache
def disassembler() -> Path | None:
    """NVIDIA's nvdisasm, of pip's package or the PATH; None if there is none."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found and found.submodule_search_locations) or ():
        if path := next(Path(folder).glob("*/bin/nvdisasm*"), None):
            return path
    on_path = shutil.which("nvdisasm")
    return Path(on_path) if on_path else None


def disassembled(cubin: bytes) -> str:
    """The assembly of a cubin. Raises FileNotFoundError if there is no nvdisasm."""
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError(f"needs nvdisasm: {INSTALL}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def count(instructions: Sequence[str], pattern: str) -> int:
    """How many of them have a name that starts with this pattern, with or without a predicate."""
    compiled = re.compile(f"{_GUARD}(?:{pattern})")
    return sum(compiled.match(text) is not None for text in instructions)


class MachineCode:
    """The instructions of a kernel, up to its last unconditional EXIT, and its jumps.

    `assembly`: what nvdisasm prints; functions beside the kernel are left out.
    """

    def __init__(self, assembly: str) -> None:
        self.everything: list[str] = []  # with what follows that EXIT
        labels: dict[str, int] = {}
        section = kernels.ENTRY
        for line in assembly.splitlines():
            if found := _SECTION.match(line):
                section = found[1]
            elif section != kernels.ENTRY:
                continue
            elif found := _LABEL.match(line):
                labels[found[1]] = len(self.everything)
            elif found := _INSTRUCTION.match(line):
                self.everything.append(found[1])
        end = max(at for at, text in enumerate(self.everything) if text == "EXIT")
        self.instructions = self.everything[: end + 1]
        self._jumps: dict[int, tuple[int, bool]] = {}  # from -> (to, whether always taken)
        for at, text in enumerate(self.instructions):
            if found := _BRANCH.match(text):
                guard, kind, predicate, label = found.groups()
                self._jumps[at] = labels[label], not (guard or kind or predicate.strip())
        self.loops = [(to, at) for at, (to, _) in self._jumps.items() if to < at]

    def hot_loop(self, kind: str, plan: Plan) -> tuple[int, int]:
        """The first instruction of the loop over voxels, and the jump back.

        Raises ValueError if there is none.
        """
        access = "STG" if kind == "gradient" else "LDG"
        words = plan.lane_channels * plan.voxels // plan.word
        found = [
            (first, last)
            for first, last in self.loops
            if count(self.instructions[first : last + 1], access) >= words
        ]
        if not found:
            raise ValueError(f"no loop has an {access} for each of {words} words")
        return min(found, key=lambda loop: loop[1] - loop[0])

    def way(self, first: int, last: int) -> list[str]:
        """The instructions that a warp executes from `first` to `last`, both included, by the
        longest way without a jump back. Raises ValueError if there is no way.
        """
        longest: dict[int, tuple[int, int]] = {last: (1, last)}  # to `last`: length, next
        for at in range(last - 1, first - 1, -1):
            ways = [(longest[to][0] + 1, to) for to in self._next(at) if at < to and to in longest]
            if ways:
                longest[at] = max(ways)
        if first not in longest:
            raise ValueError(f"no way from instruction {first} to {last}")
        found = [first]
        while found[-1] != last:
            found.append(longest[found[-1]][1])
        return [self.instructions[at] for at in found]

    def _next(self, at: int) -> Iterator[int]:
        to, always = self._jumps.get(at, (at + 1, False))
        yield to
        if not always and not _END.match(self.instructions[at]):
            yield at + 1


@dataclass(frozen=True)
class Compiled:
    """A kernel's assembly, the linker's report and the machine code."""

    kind: str
    plan: Plan
    ptx: str
    log: str
    cubin: bytes

    @functools.cached_property
    def code(self) -> MachineCode:
        """Raises FileNotFoundError if there is no nvdisasm."""
        return MachineCode(disassembled(self.cubin))

    def reported(self, pattern: str) -> int:
        """A number of the linker's report; 0 if it is not there."""
        found = re.search(pattern, self.log, re.IGNORECASE)
        return int(found[1]) if found else 0

    @property
    def registers(self) -> int:
        """Per thread."""
        return self.reported(r"used (\d+) registers")

    @property
    def shared_bytes(self) -> int:
        """Per block."""
        return self.reported(r"(\d+) bytes smem")

    @property
    def local_bytes(self) -> int:
        """Per thread: spilled registers, and arrays that are not in registers."""
        return max(self.reported(r"(\d+) bytes lmem"), self.reported(r"(\d+) bytes stack"))

    @property
    def values(self) -> int:
        """Values of a thread in a round of the loop over voxels: one for each of its classes and
        voxels.
        """
        plan = self.plan
        return (plan.lane_channels + plan.classes - plan.channels) * plan.voxels

    @functools.cached_property
    def loop(self) -> list[str]:
        """The loop over voxels, with both sides of its branches."""
        first, last = self.code.hot_loop(self.kind, self.plan)
        return self.code.instructions[first:last]

    @functools.cached_property
    def round(self) -> list[str]:
        """The instructions of a warp in a round of that loop.

        Raises ValueError if it has a loop inside, whose rounds are not known.
        """
        first, last = self.code.hot_loop(self.kind, self.plan)
        if any(first <= a and b < last for a, b in self.code.loops):
            raise ValueError("the loop over voxels has a loop inside")
        return self.code.way(first, last)

    @functools.cached_property
    def fixed(self) -> list[str]:
        """The instructions of a warp before and after that loop; other loops count as one round,
        and calls as one instruction.
        """
        first, last = self.code.hot_loop(self.kind, self.plan)
        return [
            *self.code.way(0, first)[:-1],
            *self.code.way(last + 1, len(self.code.instructions) - 1),
        ]

    @property
    def per_value(self) -> float:
        """Instructions per value in the loop over voxels."""
        return len(self.loop) / self.values


def compiled(kind: str, plan: Plan, capability: tuple[int, int]) -> Compiled:
    """A kernel compiled for GPUs of this compute capability."""
    ptx = compiler.ptx(kind, plan, capability)
    cubin, log = compiler.link(ptx, capability)
    return Compiled(kind, plan, ptx, log, cubin)
