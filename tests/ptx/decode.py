"""Turns each instruction into a Python function that executes it for the active lanes of a block.

Such a function takes the block and the mask of active lanes: an array or, if all are, True.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arithmetic
from .arithmetic import TYPES, Operation
from .faults import Fault
from .memory import LOCAL_BASE, SHARED_BASE, Invalid, Local, placed
from .module import (
    Address,
    Immediate,
    Instruction,
    Module,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)
from .races import Race
from .rounding import Array

if TYPE_CHECKING:
    from .machine import Block

Mask = Any  # True or a boolean array
Run = Callable[["Block", Mask], None]
WARP = 32
STRONG = ("relaxed", "gpu")  # in this order


class Decoder:
    """Decodes the instructions of a module. The operands are slots of `Block.values`."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.slots: dict[tuple[Any, str], int] = {}  # (register, constant or special, dtype)
        self.symbols = {
            **placed(module.shared, SHARED_BASE),
            **placed(module.local, LOCAL_BASE),
        }
        self.maybe_unwritten: set[Register] = (
            set()
        )  # whose reads are checked when they are executed

    def decode(self, one: Instruction, checked: set[Register]) -> Run:
        """`checked`: the registers that might not have been written before it.

        Raises Fault for an unknown opcode, or operands that do not fit.
        """
        try:
            run = self._decoded(one)
            if checked:
                run = self._with_check(one, run, checked)
            if self.maybe_unwritten.intersection(one.writes):
                run = self._with_note(one, run)
            if one.guard is not None and one.parts[0] not in ("bra", "ret", "bar"):
                run = self._guarded(one, run)
        except (Fault, ValueError, TypeError, KeyError) as error:
            raise Fault(f"{one}: {error}") from error
        return run

    def slot(self, operand: Operand, of: str, exact: bool = True) -> int:
        """The slot of an operand of this type; a register may be wider unless `exact`."""
        key: tuple[Any, str]
        dtype = TYPES[of]
        if isinstance(operand, Register):
            bits, wanted = self.module.registers[operand.name], _bits(of)
            if bits < wanted or (exact and bits != wanted):
                raise Fault(f"{operand.name} has {bits} bits, {of} {wanted}")
            if bits != wanted:
                dtype = TYPES[f"b{bits}"]
            key = operand.name, dtype.str
        elif isinstance(operand, Special):
            key = operand.name, dtype.str
        elif isinstance(operand, Immediate):
            key = _constant(operand, of), dtype.str
        elif isinstance(operand, Symbol) and operand.name in self.symbols:
            key = self.symbols[operand.name], dtype.str
        else:
            raise Fault(f"{operand} is no value of type {of}")
        return self.slots.setdefault(key, len(self.slots))

    def raw(self, register: Operand) -> int:
        """The slot of a register's bits."""
        if not isinstance(register, Register):
            raise Fault(f"{register} is no register")
        bits = self.module.registers[register.name]
        return self.slot(register, "pred" if bits == 1 else f"b{bits}")

    def _decoded(self, one: Instruction) -> Run:
        name = one.parts[0]
        if name in ("ld", "st"):
            return self._access(one)
        if name == "mov" and any(isinstance(each, Vector) for each in one.operands):
            return self._packing(one)
        if name in SPECIAL_CASES:
            return SPECIAL_CASES[name](self, one)
        operation = arithmetic.operation(one.opcode)
        if operation is None:
            raise Fault("unknown opcode")
        return self._arithmetic(one, operation)

    # ---- arithmetic ------------------------------------------------------------------------------

    def _arithmetic(self, one: Instruction, operation: Operation) -> Run:
        to, *operands = one.operands
        converts = one.parts[0] == "cvt"
        sources = [
            self.slot(each, of, exact=not converts)
            for each, of in zip(operands, operation.sources, strict=True)
        ]
        if converts:
            return self._conversion(to, sources, operation)
        if one.parts[0] == "div" and operation.result[0] != "f":
            return _division(one, self.slot(to, operation.result), sources, operation)
        result, function = self.slot(to, operation.result), operation.function
        if operation.approximate:
            (source,) = sources

            def approximate(block: Block, mask: Mask) -> None:
                v = block.values
                np.copyto(v[result], function(v[source], block.noise), where=mask)

            return approximate
        if isinstance(function, np.ufunc):
            return _of_ufunc(function, result, sources)

        def compute(block: Block, mask: Mask) -> None:
            v = block.values
            np.copyto(v[result], function(*[v[each] for each in sources]), where=mask)

        return compute

    def _conversion(self, to: Operand, sources: list[int], operation: Operation) -> Run:
        result = self.raw(to)
        assert isinstance(to, Register)
        bits = self.module.registers[to.name]
        of = [TYPES[each] for each in operation.sources]
        function = operation.function
        if bits < _bits(operation.result):
            raise Fault(f"{to.name} has {bits} bits, {operation.result} more")

        def convert(block: Block, mask: Mask) -> None:
            v = block.values
            values = [_as(v[each], dtype) for each, dtype in zip(sources, of, strict=True)]
            np.copyto(v[result], _widened(function(*values), bits), where=mask)

        return convert

    def _packing(self, one: Instruction) -> Run:
        """mov of a register to its parts, the lowest first, or back."""
        to, source = one.operands
        if isinstance(to, Vector):
            parts, whole = [self.raw(each) for each in to.parts], self.raw(source)
        elif isinstance(source, Vector):
            parts, whole = [self.raw(each) for each in source.parts], self.raw(to)
        else:
            raise Fault("operands do not fit")
        vector = to if isinstance(to, Vector) else source
        assert isinstance(vector, Vector)
        if len(one.parts) != 2 or _bits(one.parts[1]) != sum(map(self._bits_of, vector.parts)):
            raise Fault("the parts do not have the bits of the whole")
        dtype = TYPES[f"b{self._bits_of(vector.parts[0])}"]

        def unpack(block: Block, mask: Mask) -> None:
            v = block.values
            found = v[whole].view(dtype).reshape(-1, len(parts))
            for i, part in enumerate(parts):
                np.copyto(v[part], found[:, i], where=mask)

        def pack(block: Block, mask: Mask) -> None:
            v = block.values
            found = np.stack([v[part] for part in parts], axis=1)
            np.copyto(v[whole], found.view(v[whole].dtype)[:, 0], where=mask)

        return unpack if isinstance(to, Vector) else pack

    def _bits_of(self, operand: Operand) -> int:
        assert isinstance(operand, Register)
        return self.module.registers[operand.name]

    # ---- memory ----------------------------------------------------------------------------------

    def _access(self, one: Instruction) -> Run:
        loads, *modifiers, of = one.parts
        strong = tuple(each for each in modifiers if each in STRONG) == STRONG
        rest = [each for each in modifiers if not (strong and each in STRONG)]
        space = "global"
        if rest and rest[0] in ("global", "shared", "local", "param"):
            space = rest.pop(0)
        count = int(rest.pop(0)[1]) if rest and rest[0] in ("v2", "v4") else 1
        if rest or of not in TYPES or (strong and (space != "global" or loads == "st")):
            raise Fault("unknown opcode")
        values, where = one.operands if loads == "ld" else one.operands[::-1]
        registers = values.parts if isinstance(values, Vector) else (values,)
        if len(registers) != count or not isinstance(where, Address):
            raise Fault("operands do not fit")
        if loads == "st":
            slots = [self.slot(each, _unsigned(of), exact=False) for each in registers]
        else:
            for each in registers:
                self.slot(each, _unsigned(of), exact=False)
            slots = [self.raw(each) for each in registers]
        if space == "param":
            return self._parameter(where, of, slots, count)
        base = where.base
        at = self.slot(base, "s64") if isinstance(base, Register) else None
        fixed = where.offset
        if isinstance(base, Symbol):
            if base.name not in self.symbols:
                raise Fault(f"{base.name} has no address")
            fixed += self.symbols[base.name]
        itemsize = _bits(of) // 8
        signed = of[0] == "s"

        def load(block: Block, mask: Mask) -> None:
            lanes, positions = _active(block, mask)
            addresses = _addresses(block, at, lanes) + fixed
            found = _checked(
                one, _loaded, block, positions, addresses, space, itemsize, count, strong
            )
            for i, slot in enumerate(slots):
                value, to = np.ascontiguousarray(found[:, i]), block.values[slot]
                if signed:
                    value = value.view(f"i{itemsize}")
                to[lanes] = _widened(value, 8 * to.dtype.itemsize)

        def store(block: Block, mask: Mask) -> None:
            lanes, positions = _active(block, mask)
            addresses = _addresses(block, at, lanes) + fixed
            given = np.empty((len(positions), count), f"u{itemsize}")
            for i, slot in enumerate(slots):
                given[:, i] = block.values[slot][lanes]
            _checked(one, _stored, block, positions, addresses, space, given)

        return load if loads == "ld" else store

    def _parameter(self, where: Address, of: str, slots: list[int], count: int) -> Run:
        name = where.base.name
        if name not in self.module.parameters or count != 1:
            raise Fault(f"{name} is no parameter")
        parameter = self.module.parameters[name]
        size = _bits(of) // 8
        if not 0 <= where.offset <= parameter.size - size or where.offset % size:
            raise Fault(f"not within {name}")
        at, (slot,) = parameter.offset + where.offset, slots

        def load(block: Block, mask: Mask) -> None:
            to = block.values[slot]
            bits = int.from_bytes(block.arguments[at : at + size], "little", signed=of[0] == "s")
            np.copyto(to, to.dtype.type(bits % (1 << 8 * to.dtype.itemsize)), where=mask)

        return load

    def _atomic(self, one: Instruction) -> Run:
        if one.opcode != "atom.global.add.u32":
            raise Fault("unknown opcode")
        to, where, operand = one.operands
        if not isinstance(where, Address) or not isinstance(where.base, Register):
            raise Fault("operands do not fit")
        result, at, added = self.slot(to, "u32"), self.slot(where.base, "s64"), where.offset
        addend = self.slot(operand, "u32")

        def run(block: Block, mask: Mask) -> None:
            for lane in block.order.lanes if mask is True else np.flatnonzero(mask):
                address = block.values[at][[lane]] + added
                old = _checked(
                    one, _added, block, np.array([lane]), address, block.values[addend][lane]
                )
                block.values[result][lane] = old

        return run

    # ---- between threads -------------------------------------------------------------------------

    def _shuffle(self, one: Instruction) -> Run:
        if one.opcode != "shfl.sync.bfly.b32":
            raise Fault("unknown opcode")
        to, source, distance, clamp, members = one.operands
        pair = to.parts if isinstance(to, Vector) else (to,)
        result, given = self.slot(pair[0], "b32"), self.slot(source, "b32")
        inside = self.slot(pair[1], "pred") if len(pair) > 1 else None
        options = [self.slot(each, "u32") for each in (distance, clamp, members)]

        def run(block: Block, mask: Mask) -> None:
            v = block.values
            by, limits, expected = (v[each].astype(np.int64) for each in options)
            every = block.order.lanes
            lane, warp = every % WARP, every // WARP * WARP
            fixed = (limits >> 8) & 31
            last = (lane & fixed) | (limits & 31 & ~fixed)
            other = lane ^ (by & 31)
            found = other <= last
            partner = warp + np.where(found, other, lane)
            _check_members(one, block, mask, expected, partner)
            np.copyto(v[result], v[given][np.minimum(partner, len(every) - 1)], where=mask)
            if inside is not None:
                np.copyto(v[inside], found, where=mask)

        return run

    def _vote(self, one: Instruction) -> Run:
        """Whether a predicate holds in any lane of the warp."""
        if one.opcode != "vote.sync.any.pred":
            raise Fault("unknown opcode")
        to, source, members = one.operands
        result, given = self.slot(to, "pred"), self.slot(source, "pred")
        expected = self.slot(members, "u32")

        def run(block: Block, mask: Mask) -> None:
            v, lanes = block.values, block.order.lanes
            _check_members(one, block, mask, v[expected].astype(np.int64), lanes)
            warp = lanes // WARP
            found = np.bincount(warp, weights=v[given] & mask) > 0
            np.copyto(v[result], found[warp], where=mask)

        return run

    def _fence(self, one: Instruction) -> Run:
        if one.opcode not in ("membar.gl", "membar.cta") or one.operands:
            raise Fault("unknown opcode")

        def run(block: Block, mask: Mask) -> None:
            # A fence among the threads of a block orders nothing that another block sees.
            if one.opcode == "membar.gl":
                block.order.fence(block.order.lanes if mask is True else np.flatnonzero(mask))

        return run

    def _jump(self, one: Instruction) -> Run:
        """Executed by the machine."""
        if one.opcode not in ("bra", "bra.uni", "ret", "bar.sync"):
            raise Fault("unknown opcode")
        if one.parts[0] == "bar" and (one.operands != (Immediate(0),) or one.guard):
            raise Fault("operands do not fit")
        return lambda block, mask: None

    # ---- wrappers --------------------------------------------------------------------------------

    def _guarded(self, one: Instruction, run: Run) -> Run:
        assert one.guard is not None
        guard, negated = self.slot(one.guard, "pred"), one.negated

        def guarded(block: Block, mask: Mask) -> None:
            active = mask & (block.values[guard] ^ negated)
            if active.all():
                run(block, True)
            elif active.any():
                run(block, active)

        return guarded

    def _with_check(self, one: Instruction, run: Run, checked: set[Register]) -> Run:
        names = sorted(each.name for each in checked)

        def check(block: Block, mask: Mask) -> None:
            for name in names:
                missing = mask & ~block.assigned[name]
                if missing.any():
                    raise fault(one, block, int(np.argmax(missing)), f"{name} was never written")
            run(block, mask)

        return check

    def _with_note(self, one: Instruction, run: Run) -> Run:
        names = [each.name for each in one.writes if each in self.maybe_unwritten]

        def note(block: Block, mask: Mask) -> None:
            run(block, mask)
            for name in names:
                block.assigned[name] |= mask

        return note


SPECIAL_CASES: dict[str, Any] = {
    "atom": Decoder._atomic,
    "shfl": Decoder._shuffle,
    "vote": Decoder._vote,
    "membar": Decoder._fence,
    "bra": Decoder._jump,
    "ret": Decoder._jump,
    "bar": Decoder._jump,
}


def fault(one: Instruction, block: Block, thread: int | None, text: str) -> Fault:
    """The error of a check."""
    who = "" if thread is None else f", thread {thread}"
    return Fault(f"block {block.index}{who}, {one}: {text}")


def _bits(of: str) -> int:
    return 1 if of == "pred" else 8 * int(TYPES[of].itemsize)


def _unsigned(of: str) -> str:
    return f"b{_bits(of)}"


def _constant(operand: Immediate, of: str) -> Any:
    """The bits of a constant of this type, as an integer."""
    if operand.bits not in (0, _bits(of)):
        raise Fault(f"a constant of {operand.bits} bits, not {_bits(of)}")
    limit = 1 << _bits(of)
    if not -limit // 2 <= operand.value < limit:
        raise Fault(f"{operand.value} is out of the range of {of}")
    return operand.value % limit


def _as(values: Array, dtype: Any) -> Array:
    """Their lowest bits as numbers of this dtype."""
    if values.dtype == dtype:
        return values
    if values.dtype.itemsize == dtype.itemsize:
        return values.view(dtype)
    return values.astype(f"u{dtype.itemsize}").view(dtype)


def _widened(values: Array, bits: int) -> Array:
    """Their bits, extended by their sign if they are signed."""
    itemsize = bits // 8
    if values.dtype.kind == "i":
        values = values.astype(f"i{itemsize}")
    elif values.dtype.kind == "f":
        values = values.view(f"u{values.dtype.itemsize}")
    return values.astype(f"u{itemsize}", copy=False)


def _of_ufunc(function: Any, result: int, sources: list[int]) -> Run:
    """NumPy's ufuncs write where they are told to."""
    if len(sources) == 1:
        (only,) = sources

        def unary(block: Block, mask: Mask) -> None:
            v = block.values
            function(v[only], out=v[result], where=mask)

        return unary
    first, second = sources

    def binary(block: Block, mask: Mask) -> None:
        v = block.values
        function(v[first], v[second], out=v[result], where=mask)

    return binary


def _division(one: Instruction, result: int, sources: list[int], operation: Operation) -> Run:
    """Of integers; by 0 the result is undefined."""
    dividend, divisor = sources

    def divide(block: Block, mask: Mask) -> None:
        v = block.values
        by_zero = (v[divisor] == 0) & mask
        if by_zero.any():
            raise fault(one, block, int(np.argmax(by_zero)), "division by 0")
        np.copyto(v[result], operation.function(v[dividend], v[divisor]), where=mask)

    return divide


def _active(block: Block, mask: Mask) -> tuple[Any, Array]:
    """(an index, the numbers) of the active lanes."""
    if mask is True:
        return slice(None), block.order.lanes
    lanes = np.flatnonzero(mask)
    return lanes, lanes


def _addresses(block: Block, at: int | None, lanes: Any) -> Array:
    if at is None:
        return np.zeros(len(block.order.lanes[lanes]), np.int64)
    return block.values[at][lanes]


def _checked(
    one: Instruction, access: Any, block: Block, lanes: Array, addresses: Array, *arguments: Any
) -> Any:
    """The result of an access by these lanes, whose error is reported with its place."""
    try:
        return access(block, lanes, addresses, *arguments)
    except (Invalid, Race) as error:
        at, lane = int(addresses[error.position]), int(lanes[error.position])
        raise fault(one, block, lane, f"{error} at address {at:#x}") from error


def _loaded(
    block: Block,
    lanes: Array,
    addresses: Array,
    space: str,
    itemsize: int,
    count: int,
    strong: bool,
) -> Array:
    width = itemsize * count
    if space == "local":
        local = block.local
        at = local.offsets(addresses, width, lanes)
        unwritten = ~local.written[at[:, None] + np.arange(width)].all(axis=1)
        if unwritten.any():
            raise Invalid(int(np.argmax(unwritten)), "a read of local memory never written")
        return local.words(itemsize, count)[at // width]
    found: Array = np.empty((len(addresses), count), f"u{itemsize}")
    for region, which, first in block.spaces[space].located(addresses, width):
        if space == "shared":
            unwritten = region.shadow.unwritten(first, width)
            if unwritten.any():
                raise _moved(
                    Invalid(int(np.argmax(unwritten)), "a read of shared memory never written"),
                    which,
                )
        try:
            region.shadow.read(first, width, block.order, lanes[which], strong)
        except Race as error:
            raise _moved(error, which) from error
        found[which] = region.words(itemsize, count)[first // width]
    return found


def _stored(block: Block, lanes: Array, addresses: Array, space: str, given: Array) -> None:
    itemsize, count = given.dtype.itemsize, given.shape[1]
    width = itemsize * count
    if space == "local":
        local: Local = block.local
        at = local.offsets(addresses, width, lanes)
        local.written[at[:, None] + np.arange(width)] = True
        local.words(itemsize, count)[at // width] = given
        return
    for region, which, first in block.spaces[space].located(addresses, width):
        try:
            region.shadow.write(first, width, block.order, lanes[which])
        except Race as error:
            raise _moved(error, which) from error
        region.words(itemsize, count)[first // width] = given[which]


def _added(block: Block, lanes: Array, address: Array, addend: Any) -> Any:
    """The old number, to which the addend is added, by one lane."""
    ((region, _, first),) = block.spaces["global"].located(address, 4)
    region.shadow.update(int(first[0]), 4, block.order, int(lanes[0]))
    word = region.words(4, 1)[int(first[0]) // 4]
    old = word[0].copy()
    word[0] = (int(old) + int(addend)) & 0xFFFFFFFF
    return old


def _moved(error: Any, which: Any) -> Any:
    """The error with the position among all active lanes."""
    if not isinstance(which, slice):
        error.position = int(which[error.position])
    return error


def _check_members(
    one: Instruction, block: Block, mask: Mask, expected: Array, partner: Array
) -> None:
    """All threads of the member mask of a shuffle or vote have to execute it, the thread and its
    partner too.
    """
    lanes = block.order.lanes
    active = np.broadcast_to(np.asarray(mask), lanes.shape)
    padded = np.zeros(-(-len(lanes) // WARP) * WARP, np.int64)
    padded[: len(lanes)] = active
    bits = (padded.reshape(-1, WARP) << np.arange(WARP)).sum(axis=1)[lanes // WARP]
    absent = active & ((expected & ~bits) != 0)
    outside = active & (((expected >> (lanes % WARP)) & (expected >> (partner % WARP)) & 1) == 0)
    for wrong, text in (
        (absent, "a shuffle or vote without all threads of its mask"),
        (outside, "a shuffle or vote with a thread that is not in its mask"),
    ):
        if wrong.any():
            raise fault(one, block, int(np.argmax(wrong)), text)
