"""Executes a kernel: all threads of a block in lock step, and blocks in random turns.

The threads with the lowest program counter go on, so that those that took different branches meet
again where the branches do. Blocks take turns before atomic operations and after barriers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import flow, memory
from .arithmetic import Noise
from .decode import Decoder, Run, fault
from .faults import Fault
from .module import Instruction, Module, Register, parse
from .races import Order
from .rounding import Array

RESIDENT = 8  # blocks that take turns, at most


@dataclass(frozen=True)
class Step:
    """A basic block, decoded."""

    runs: tuple[Run, ...]
    last: Instruction
    kind: str  # of the last: bra, ret, bar; or none of these
    guard: int | None  # the slot of its predicate
    target: int
    following: int
    waits: bool  # lets other blocks go before it


class Kernel:
    """A module, decoded. Raises Fault for what the executor does not know."""

    def __init__(self, text: str) -> None:
        self.module: Module = parse(text)
        instructions = self.module.instructions
        if not instructions or instructions[-1].parts[0] not in ("ret", "bra"):
            raise Fault("the last instruction is not ret")
        self.graph = flow.basics(self.module)
        self.decoder = Decoder(self.module)
        reads: dict[int, set[Register]] = {}
        for at, register in flow.maybe_unwritten(self.module, self.graph):
            reads.setdefault(at, set()).add(register)
        self.decoder.maybe_unwritten = {each for registers in reads.values() for each in registers}
        runs = [
            self.decoder.decode(one, reads.get(at, set())) for at, one in enumerate(instructions)
        ]
        self.layout = self._layout()
        self.block_numbers = [
            (slot, dtype)
            for (name, dtype), slot in self.decoder.slots.items()
            if name == "%ctaid.x"
        ]
        self.steps = {at: self._step(basic, runs) for at, basic in self.graph.items()}

    def _layout(self) -> list[tuple[int, dict[str, list[tuple[int, int]]]]]:
        """For each width of registers, their number, and for each dtype (slot, register)."""
        rows: dict[str, int] = {}
        layout: dict[int, tuple[list[str], dict[str, list[tuple[int, int]]]]] = {}
        for (name, dtype), slot in self.decoder.slots.items():
            if name not in self.module.registers:
                continue
            names, views = layout.setdefault(self.module.registers[name], ([], {}))
            if name not in rows:
                rows[name] = len(names)
                names.append(name)
            views.setdefault(dtype, []).append((slot, rows[name]))
        return [(len(names), views) for names, views in layout.values()]

    def _step(self, basic: flow.Basic, runs: list[Run]) -> Step:
        last = self.module.instructions[basic.stop - 1]
        kind = last.parts[0] if last.parts[0] in flow.ENDS else ""
        guard = None if last.guard is None or not kind else self.decoder.slot(last.guard, "pred")
        target, *_ = [*flow.targets(self.module, last), basic.stop]
        waits = self.module.instructions[basic.start].parts[0] in flow.STARTS
        own = runs[basic.start : basic.stop - bool(kind)]
        return Step(tuple(own), last, kind, guard, target, basic.stop, waits)


def launch(
    kernel: Kernel,
    blocks: int,
    threads: int,
    arguments: bytes,
    allocations: Mapping[int, int],
    *,
    seed: int = 0,
    noise: Noise = None,
) -> Counter[str]:
    """Executes a kernel on host memory; returns how often each opcode was executed, by lanes.

    Parameters
    ----------
    arguments
        The packed arguments, in the layout of the kernel's parameters.
    allocations
        The address and the size of each allocation.
    seed
        Of the order of the blocks.
    noise
        If it is not None, approximate instructions are off by as much as their documentation
        allows; the errors depend on it. Otherwise their results are the exact ones, rounded.
    """
    if len(arguments) != kernel.module.arguments_size:
        raise Fault(f"{len(arguments)} bytes of arguments, not {kernel.module.arguments_size}")
    order = np.random.default_rng(seed)
    space = memory.host(allocations)
    constants = _constants(kernel, blocks, threads)
    executed = dict.fromkeys(kernel.steps, 0)  # by how many lanes
    waiting = [int(index) for index in order.permutation(blocks)]
    resident: list[Block] = []
    with np.errstate(all="ignore"):
        while waiting or resident:
            while waiting and len(resident) < RESIDENT:
                index = waiting.pop()
                resident.append(
                    Block(kernel, index, threads, arguments, space, constants, noise, executed)
                )
            turn = int(order.integers(len(resident)))
            if resident[turn].ends():
                resident.pop(turn)
    counts: Counter[str] = Counter()
    for at, basic in kernel.graph.items():
        for one in kernel.module.instructions[basic.start : basic.stop]:
            counts[one.opcode] += executed[at]
    return counts


def _constants(kernel: Kernel, blocks: int, threads: int) -> dict[int, Array]:
    """The values of the slots that all blocks share."""
    special: dict[str, Any] = {
        "%tid.x": np.arange(threads),
        "%ntid.x": threads,
        "%nctaid.x": blocks,
    }
    values = {}
    for (name, dtype), slot in kernel.decoder.slots.items():
        if name in special:
            values[slot] = np.full(threads, special[name], dtype)
        elif isinstance(name, int):
            bits = np.dtype(dtype).itemsize
            unsigned = np.full(threads, name, bool if dtype == "|b1" else f"u{bits}")
            values[slot] = unsigned.view(dtype)
    return values


class Block:
    """A block of threads: its registers, memory and program counters."""

    def __init__(
        self,
        kernel: Kernel,
        index: int,
        threads: int,
        arguments: bytes,
        space: memory.Space,
        constants: dict[int, Array],
        noise: Noise,
        executed: dict[int, int],
    ) -> None:
        self.kernel, self.index, self.threads = kernel, index, threads
        self.arguments, self.noise, self.executed = arguments, noise, executed
        self.order = Order(index, threads)
        self.spaces = {"global": space, "shared": memory.shared(kernel.module.shared)}
        self.local = memory.Local(kernel.module.local, threads)
        self.values = self._registers(constants)
        self.assigned = {
            register.name: np.zeros(threads, bool) for register in kernel.decoder.maybe_unwritten
        }
        # The program counters: a common one or, where threads diverged, that of each.
        self.common: int | None = 0
        self.counters = np.zeros(threads, np.int64)
        self.running = np.ones(threads, bool)
        self.at_barrier = np.zeros(threads, bool)
        self.waited = False

    def _registers(self, constants: dict[int, Array]) -> list[Array]:
        """The values of all slots: views of the rows of one array per width of registers."""
        values: list[Any] = [None] * len(self.kernel.decoder.slots)
        for slot, constant in constants.items():
            values[slot] = constant
        for slot, dtype in self.kernel.block_numbers:
            values[slot] = np.full(self.threads, self.index, dtype)
        for count, views in self.kernel.layout:
            width = np.dtype(next(iter(views))).itemsize
            stored = np.full((count, self.threads * width), 0x5A, np.uint8)
            if "|b1" in views:
                stored &= 1
            for dtype, slots in views.items():
                rows = list(stored.view(dtype))
                for slot, row in slots:
                    values[slot] = rows[row]
        return values

    def ends(self) -> bool:
        """Executes it up to a barrier or an atomic operation, or to its end."""
        while True:
            if self.common is not None:
                at, mask, active = self.common, True, self.threads
            else:
                ready = self.running & ~self.at_barrier
                if not ready.any():
                    if not self.at_barrier.any():
                        return True
                    self._pass_barrier()
                    return False
                at = int(self.counters[ready].min())
                chosen = ready & (self.counters == at)
                active = int(np.count_nonzero(chosen))
                mask = True if active == self.threads else chosen
            step = self.kernel.steps[at]
            if step.waits and not self.waited:
                self.waited = True
                return False
            self.waited = False
            for run in step.runs:
                run(self, mask)
            self.executed[at] += active
            if step.kind == "bra" or step.kind == "ret":
                if self._jumps(step, mask):
                    return True
            elif step.kind == "bar":
                if mask is True:
                    self.common = step.following
                    self.order.barrier()
                    return False
                self.at_barrier |= mask
                self.counters[mask] = step.following
            else:
                self._go(step.following, mask)

    def _go(self, to: int, mask: Any) -> None:
        if mask is True:
            self.common = to
        else:
            self.counters[mask] = to

    def _jumps(self, step: Step, mask: Any) -> bool:
        """Moves the program counters; returns whether all threads have ended."""
        if step.guard is None:
            taken, others = mask, False
        else:
            condition = self.values[step.guard] ^ step.last.negated
            taken, others = mask & condition, mask & ~condition
            if mask is True and (taken.all() or not taken.any()):
                taken, others = (True, False) if taken[0] else (False, True)
        for chosen, to in ((taken, step.target), (others, step.following)):
            if chosen is False:
                continue
            if chosen is not True:
                self.common = None
            if step.kind == "ret" and chosen is taken:
                if chosen is True:
                    return True
                self.running &= ~chosen
            else:
                self._go(to, chosen)
        return False

    def _pass_barrier(self) -> None:
        """All threads that have not ended wait."""
        reached = np.unique(self.counters[self.at_barrier])
        instructions = self.kernel.module.instructions
        first = instructions[int(reached[0]) - 1]
        if not self.running.all():
            thread = int(np.argmin(self.running))
            raise fault(first, self, thread, "some threads ended before a barrier")
        if len(reached) > 1:
            second = instructions[int(reached[1]) - 1]
            raise fault(first, self, None, f"threads wait at different barriers, also at {second}")
        self.at_barrier[:] = False
        self.common = int(reached[0])
        self.order.barrier()
