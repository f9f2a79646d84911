"""The control flow of a kernel: basic blocks, and which registers may be read before written."""

from __future__ import annotations

from dataclasses import dataclass

from .module import Instruction, Module, Register, Symbol

ENDS = ("bra", "ret", "bar")  # the last of a basic block
STARTS = ("atom",)  # the first: other blocks may run before it


@dataclass(frozen=True)
class Basic:
    """A basic block: instructions start to stop, which all are executed or none."""

    start: int
    stop: int
    successors: tuple[int, ...]  # their starts


def basics(module: Module) -> dict[int, Basic]:
    """The basic blocks by their start."""
    instructions = module.instructions
    count = len(instructions)
    starts = {0, *module.labels.values()}
    for at, one in enumerate(instructions):
        if one.parts[0] in ENDS:
            starts.add(at + 1)
        if one.parts[0] in STARTS:
            starts.add(at)
    ordered = sorted(at for at in starts if at < count)
    found = {}
    for start, stop in zip(ordered, [*ordered[1:], count], strict=True):
        last = instructions[stop - 1]
        following = [stop] if _falls_through(last) and stop < count else []
        found[start] = Basic(start, stop, (*targets(module, last), *following))
    return found


def targets(module: Module, one: Instruction) -> list[int]:
    """Where a branch goes to."""
    if one.parts[0] != "bra":
        return []
    (target,) = one.operands
    assert isinstance(target, Symbol)
    return [module.labels[target.name]]


def _falls_through(one: Instruction) -> bool:
    return one.guard is not None or one.parts[0] not in ("bra", "ret")


def maybe_unwritten(module: Module, graph: dict[int, Basic]) -> set[tuple[int, Register]]:
    """The reads, (instruction, register), that a path without a write of that register reaches."""
    numbers = {Register(name): 1 << i for i, name in enumerate(module.registers)}
    always = {at: _written(module, basic, numbers) for at, basic in graph.items()}
    everything = (1 << len(numbers)) - 1
    before = dict.fromkeys(graph, everything)  # written on all paths to the basic block
    before[0] = 0
    todo = [0]
    visited = set()
    while todo:
        at = todo.pop()
        visited.add(at)
        after = before[at] | always[at]
        for successor in graph[at].successors:
            known = before[successor] & after
            if known != before[successor] or successor not in visited:
                before[successor] = known
                todo.append(successor)
    found: set[tuple[int, Register]] = set()
    for at, basic in graph.items():
        known = before[at]
        for i in range(basic.start, basic.stop):
            one = module.instructions[i]
            found.update((i, each) for each in one.reads if not known & numbers[each])
            if one.guard is None:
                for each in one.writes:
                    known |= numbers[each]
    return found


def _written(module: Module, basic: Basic, numbers: dict[Register, int]) -> int:
    written = 0
    for one in module.instructions[basic.start : basic.stop]:
        if one.guard is None:
            for each in one.writes:
                written |= numbers[each]
    return written
