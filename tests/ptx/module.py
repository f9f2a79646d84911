"""Parses the PTX of one kernel into its declarations and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .faults import Fault

SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x")
# The first operand of all others is the destination.
WITHOUT_RESULT = ("st", "bra", "bar", "membar", "ret")
IGNORED = (
    ".version",
    ".target",
    ".address_size",
    ".pragma",
    ".common",
    ".maxntid",
    ".minnctapersm",
)


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a floating-point number of `bits` bits."""

    value: int
    bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter or label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b}, or d|p of a shuffle."""

    parts: tuple[Operand, ...]


Operand = Register | Special | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None = None
    negated: bool = False

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @cached_property
    def writes(self) -> tuple[Register, ...]:
        if self.parts[0] in WITHOUT_RESULT:
            return ()
        return tuple(_registers(self.operands[0]))

    @cached_property
    def reads(self) -> tuple[Register, ...]:
        sources = self.operands if self.parts[0] in WITHOUT_RESULT else self.operands[1:]
        guard = (self.guard,) if self.guard else ()
        return (*guard, *(each for operand in sources for each in _registers(operand)))


@dataclass(frozen=True)
class Variable:
    """An array of bytes or, in the block of arguments, a parameter at an offset."""

    size: int
    alignment: int
    offset: int = 0


@dataclass
class Module:
    name: str = ""
    parameters: dict[str, Variable] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # bits; 1 for a predicate
    shared: dict[str, Variable] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the index of the next instruction

    @property
    def arguments_size(self) -> int:
        return max((each.offset + each.size for each in self.parameters.values()), default=0)


def parse(text: str) -> Module:
    """Raises Fault for what is not understood, and if a register is read that nothing writes."""
    module, scopes = Module(), _Scopes()
    for line, statement in _statements(text):
        try:
            _read(module, scopes, line, statement)
        except (Fault, ValueError, IndexError) as error:
            raise Fault(f"line {line}: {statement}: {error}") from error
    if not module.name:
        raise Fault("no entry")
    _check_names(module)
    return module


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, statement), in which a statement is also a brace, a label, or a line of the header."""
    for line, raw in enumerate(text.splitlines(), 1):
        rest = raw.partition("//")[0].strip()
        while rest:
            if match := re.match(r"[{}](?=\s*$|\s*[.@a-z])|[$\w]+:|[^;]*;?", rest):
                yield line, match[0].strip()
                rest = rest[match.end() :].strip()


class _Scopes:
    """The nested scopes, whose registers are renamed apart."""

    def __init__(self) -> None:
        self.names: list[dict[str, str]] = []

    def resolve(self, name: str) -> str:
        for names in reversed(self.names):
            if name in names:
                return names[name]
        raise Fault(f"{name} is not declared")


def _read(module: Module, scopes: _Scopes, line: int, statement: str) -> None:
    if statement == "{":
        scopes.names.append({})
    elif statement == "}":
        scopes.names.pop()
    elif statement in ("(", ")") or statement.startswith(IGNORED):
        pass
    elif match := re.fullmatch(r"([$\w]+):", statement):
        module.labels[match[1]] = len(module.instructions)
    elif match := re.fullmatch(r"(?:\.visible )?\.entry (\w+)\(?", statement):
        if module.name:
            raise Fault("a second entry")
        module.name = match[1]
    elif match := re.fullmatch(r"\.param \.[a-z](\d+) (\w+),?\)?", statement):
        size = int(match[1]) // 8
        offset = -(-module.arguments_size // size) * size
        module.parameters[match[2]] = Variable(size, size, offset)
    elif match := re.fullmatch(r"\.reg \.(pred|[bfsu](\d+))\s+(%\w+)(?:<(\d+)>)?;", statement):
        names = [match[3]] if match[4] is None else [f"{match[3]}{i}" for i in range(int(match[4]))]
        for name in names:
            unique = name if len(scopes.names) == 1 else f"{name}@{line}"
            scopes.names[-1][name] = unique
            module.registers[unique] = int(match[2] or 1)
    elif match := re.fullmatch(
        r"(?:\.visible )?\.(shared|local) \.align (\d+) \.b8\s+(\w+)\[(\d+)\];", statement
    ):
        where = module.shared if match[1] == "shared" else module.local
        where[match[3]] = Variable(int(match[4]), int(match[2]))
    elif match := re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);", statement, re.DOTALL):
        guard = Register(scopes.resolve(match[2])) if match[2] else None
        operands = tuple(_operand(each, scopes) for each in _separated(match[4]))
        module.instructions.append(
            Instruction(line, statement, match[3], operands, guard, match[1] == "!")
        )
    else:
        raise Fault("not understood")


def _separated(text: str) -> list[str]:
    return [each.strip() for each in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text)]


def _operand(text: str, scopes: _Scopes) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(each, scopes) for each in _separated(text[1:-1])))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        inner = _operand(base.strip(), scopes)
        if not isinstance(inner, Register | Symbol):
            raise Fault(f"{base} is not an address")
        return Address(inner, int(offset or 0))
    if "|" in text:
        return Vector(tuple(_operand(each, scopes) for each in text.split("|")))
    if text in SPECIAL:
        return Special(text)
    if text[0] == "%":
        return Register(scopes.resolve(text))
    if match := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
        return Immediate(int(match[2], 16), 32 if match[1] == "f" else 64)
    if re.fullmatch(r"-?\d+|-?0x[0-9A-Fa-f]+", text):
        return Immediate(int(text, 0))
    if re.fullmatch(r"[$\w]+", text):
        return Symbol(text)
    raise Fault(f"operand {text} is not understood")


def _registers(operand: Operand) -> Iterator[Register]:
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Vector):
        for each in operand.parts:
            yield from _registers(each)
    elif isinstance(operand, Address):
        yield from _registers(operand.base)


def _check_names(module: Module) -> None:
    written = {each for one in module.instructions for each in one.writes}
    for one in module.instructions:
        for register in one.reads:
            if register not in written:
                raise Fault(f"{one}: {register.name} is never written")
        if one.parts[0] == "bra":
            (target,) = one.operands
            if not isinstance(target, Symbol) or target.name not in module.labels:
                raise Fault(f"{one}: no such label")
