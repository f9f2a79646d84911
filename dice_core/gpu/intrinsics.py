"""What numba.cuda lacks, as LLVM: vector loads and stores, half precision, a fast exponential and
logarithm, an atomic counter.

Pointers are `CPointer(uint8)`, offsets are bytes. This is the only file that touches numba's
extension API. Nothing here computes in half precision: numbers are float32 (float64 for float64)
from load to store.
"""

# mypy: disallow-untyped-decorators=false

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

POINTER = types.CPointer(types.uint8)
REAL = {
    "float16": types.float32,
    "bfloat16": types.float32,
    "float32": types.float32,
    "float64": types.float64,
}
LOG2_E = 1.4426950408889634
FLOAT32_LOG2_E = 1.4426950216293335  # rounded to float32
LOG_2, LOG_2_REST = 0.6931471805599453, 2.3190468138462996e-17  # their sum has twice the precision
# Of p in log(1 + f) = f + f**2 p(f), |f| <= 1/3: a minimax fit, with relative error 3e-8.
LOG_COEFFICIENTS = (
    *(-0.49999937, 0.33333197, -0.25007820, 0.20011169),
    *(-0.16415960, 0.13995807, -0.15388547, 0.14026363),
)
# Of p in log((1 + s) / (1 - s)) = 2 s + s**3 p(s**2), |s| <= 1/5: likewise, with 2e-17.
ATANH_COEFFICIENTS = (
    *(0.6666666666667244, 0.399999999962693, 0.2857142938026753, 0.22222139506443597),
    *(0.18186321200962322, 0.15250794043292884, 0.153640302360838),
)
# Of a polynomial for exp(f), |f| <= log(2) / 2: a minimax fit, with relative error 4e-18.
EXP_COEFFICIENTS = (
    *(1.0, 1.0, 0.5000000000000011, 0.1666666666666641, 0.04166666666653016, 0.008333333333494964),
    *(0.0013888888943636034, 0.00019841269505995013, 2.4801493088293116e-05),
    *(2.7557586562645156e-06, 2.763025322479453e-07, 2.500008189021538e-08),
)
LEAST_EXPONENT = -708.3964185322641  # exp of it is the least normal float64
WORD_BYTES = 16  # of the widest access

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F16, _F32, _F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_FLOATS = {"float16": _F16, "bfloat16": _I16, "float32": _F32, "float64": _F64}
_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


def load_numbers(dtype: str, count: int, absent: float = 0.0) -> Callable[..., Any]:
    """(pointer, offset, condition) -> a tuple of `count` adjacent numbers as REAL[dtype], in one
    load; if the condition does not hold, of the number `absent`, which float16 must represent.
    """
    result = types.UniTuple(REAL[dtype], count)

    @intrinsic
    def load(typingctx: Any, pointer: Any, offset: Any, condition: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            fill = int.from_bytes(_encoded(absent, dtype), "little")
            words = _load_if(builder, args, _BITS[dtype], count, fill)
            if _BITS[dtype] == 16 and count > 1:
                numbers = [half for pair in words for half in _halves(builder, pair, dtype)]
            else:
                stored = _elements(builder, words, _FLOATS[dtype], count)
                numbers = [_widened(builder, number, dtype) for number in stored]
            return context.make_tuple(builder, result, numbers)

        return result(POINTER, types.int64, types.boolean), codegen

    return load


def load_labels(dtype: str, count: int) -> Callable[..., Any]:
    """(pointer, offset, condition) -> a tuple of `count` adjacent labels as `label_type`, in one
    load; of 0 if the condition does not hold.
    """
    bits = 8 if dtype == "bool" else int(dtype.lstrip("uint"))
    result = types.UniTuple(label_type(dtype), count)

    @intrinsic
    def load(typingctx: Any, pointer: Any, offset: Any, condition: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            words = _load_if(builder, args, bits, count, 0)
            labels = _elements(builder, words, ir.IntType(bits), count)
            if bits < 32:
                widen = builder.sext if dtype.startswith("int") else builder.zext
                labels = [widen(label, _I32) for label in labels]
            return context.make_tuple(builder, result, labels)

        return result(POINTER, types.int64, types.boolean), codegen

    return load


def load_number(dtype: str) -> Callable[..., Any]:
    """(pointer, offset) -> a number, as REAL[dtype]."""

    @intrinsic
    def load(typingctx: Any, pointer: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            address = _address(builder, args[0], args[1], _FLOATS[dtype])
            return _widened(builder, builder.load(address, align=_BITS[dtype] // 8), dtype)

        return REAL[dtype](POINTER, types.int64), codegen

    return load


def label_type(dtype: str) -> Any:
    """The type that labels are compared in: int32 or, for 64-bit ones, int64, where unsigned labels
    too large for it turn negative; REAL[dtype] for floating-point targets.
    """
    if dtype in REAL:
        return REAL[dtype]
    return types.int64 if dtype.endswith("64") else types.int32


def load_targets(dtype: str, count: int) -> Callable[..., Any]:
    """`load_labels` for any dtype; `load_numbers` for floating-point targets."""
    return (load_numbers if dtype in REAL else load_labels)(dtype, count)


def store_numbers(dtype: str, count: int, step: int) -> Callable[..., Any]:
    """(pointer, offset, array, first, condition): if the condition holds, stores `count` numbers of
    the array, of REAL[dtype], every `step`-th from `first` on, rounded to nearest even, in one
    store. That is predicated: for a branch, the compiler would repeat what leads to it.
    """

    @intrinsic
    def store(
        typingctx: Any, pointer: Any, offset: Any, array: Any, first: Any, condition: Any
    ) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            pointer, offset, array, first, condition = args
            data = context.make_array(signature.args[2])(context, builder, array).data
            pointers = [
                builder.gep(data, [builder.add(first, _I64(i * step))]) for i in range(count)
            ]
            numbers = [builder.load(each) for each in pointers]
            if dtype == "bfloat16" and count > 1:
                halves = zip(numbers[::2], numbers[1::2], strict=True)
                pairs = [_pair(builder, low, high) for low, high in halves]
                _store_if(builder, condition, pointer, offset, pairs, 32)
            else:
                stored = [_narrowed(builder, number, dtype) for number in numbers]
                _store_if(builder, condition, pointer, offset, stored, _BITS[dtype])
            return context.get_dummy_value()

        return types.void(POINTER, types.int64, array, types.int64, types.boolean), codegen

    return store


def store_number(dtype: Any) -> Callable[..., Any]:
    """(pointer, offset, number): stores a number of this numba type."""

    @intrinsic
    def store(typingctx: Any, pointer: Any, offset: Any, number: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            pointer, offset, number = args
            _store(builder, pointer, offset, number, dtype.bitwidth)
            return context.get_dummy_value()

        return types.void(POINTER, types.int64, dtype), codegen

    return store


@intrinsic
def load_relaxed(typingctx: Any, pointer: Any, offset: Any) -> Any:
    """Loads a float64 that another block may have written in this launch, bypassing L1."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(_F64, [_I64])
        address = _pointer_bits(builder, *args)
        text = "ld.relaxed.gpu.f64 $0, [$1];"
        return builder.asm(function, text, "=d,l,~{memory}", [address], True)

    return types.float64(POINTER, types.int64), codegen


@intrinsic
def atomic_increment(typingctx: Any, pointer: Any) -> Any:
    """Adds one to the int32 there, atomically; returns its old value."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        counter = _address(builder, args[0], _I64(0), _I32)
        return builder.atomic_rmw("add", counter, _I32(1), "monotonic")

    return types.int32(POINTER), codegen


@intrinsic
def exp(typingctx: Any, x: Any) -> Any:
    """exp(x), 0 where the result would be subnormal. float32: relative error at most
    2 ulp + 1.3 |x| / 2**24. float64: within 1 ulp for x < 709.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _exp(builder, *args)

    return x(x), codegen


@intrinsic
def log(typingctx: Any, x: Any) -> Any:
    """log(x) of a normal number or NaN. float32: within 1 ulp for x < 1e38. float64: within 1.5 ulp
    for x < 1e307.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _log(builder, *args)

    return x(x), codegen


@intrinsic
def sigmoids(typingctx: Any, x: Any) -> Any:
    """b = 1 / (1 + exp(-x)), 1 - b, -log(b) and -log(1 - b), of one exponential and one logarithm,
    each with the relative error of `exp` where it is small; NaN of NaN.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        (x,) = args
        one, size = ir.Constant(x.type, 1.0), _absolute(builder, x)
        e = _exp(builder, _negated(builder, size))
        total = builder.fadd(e, one)
        larger = _reciprocal(builder, total)
        smaller = builder.fmul(e, larger)
        lost = builder.fsub(e, builder.fsub(total, one))  # the rounding error of the sum
        nll = builder.fma(lost, larger, _log(builder, total))  # of the larger one
        other_nll = builder.fadd(nll, size)
        negative = builder.fcmp_ordered("<", x, ir.Constant(x.type, 0.0))
        pairs = ((smaller, larger), (larger, smaller), (other_nll, nll), (nll, other_nll))
        results = [builder.select(negative, *pair) for pair in pairs]
        return context.make_tuple(builder, signature.return_type, results)

    return types.UniTuple(x, 4)(x), codegen


@intrinsic
def floor_divide(typingctx: Any, a: Any, b: Any) -> Any:
    """a // b of numbers >= 0 in 32 bits, which numba would widen to 64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.udiv(*args)

    return types.uint32(types.int32, types.int32), codegen


@intrinsic
def divide(typingctx: Any, a: Any, b: Any) -> Any:
    """a / b, correctly rounded, without numba's test for b = 0."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return a(a, a), codegen


@intrinsic
def reciprocal(typingctx: Any, x: Any) -> Any:
    """1 / x, within 1 ulp, of a finite number >= 1, or NaN."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return _reciprocal(builder, *args)

    return x(x), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once. Left to itself, the compiler fuses the two operations only now and
    then.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, a, a), codegen


@intrinsic
def fmax(typingctx: Any, a: Any, b: Any) -> Any:
    """C's fmax: the larger number, or the other number if one is NaN."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if signature.return_type == types.float64:
            return _inline_asm(builder, "max.f64 $0, $1, $2;", _F64, "=d,d,d", *args)
        return _inline_asm(builder, "max.f32 $0, $1, $2;", _F32, "=f,f,f", *args)

    return a(a, a), codegen


def scaled_power(factor: float, exponent: float) -> Callable[..., Any]:
    """x -> factor x**exponent, by squaring; x must be normal and > 0 unless the exponent is a whole
    number in [0, 2**31).
    """

    @intrinsic
    def power(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            (base,) = args
            if _is_whole(exponent):
                result = _whole_power(builder, base, int(exponent))
            else:
                times = ir.Constant(base.type, float(exponent))
                result = _exp(builder, builder.fmul(times, _log(builder, base)))
            scale = ir.Constant(base.type, float(factor))
            return result if factor == 1 else builder.fmul(result, scale)

        return x(x), codegen

    return power


def probability_power(exponent: float) -> Callable[..., Any]:
    """x, -log x -> x**exponent, for 0 <= x <= 1 and exponents >= 0, without another logarithm."""

    @intrinsic
    def power(typingctx: Any, x: Any, nll: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            x, nll = args
            if _is_whole(exponent):
                return _whole_power(builder, x, int(exponent))
            return _exp(builder, builder.fmul(ir.Constant(x.type, -float(exponent)), nll))

        return x(x, x), codegen

    return power


def power_complement(exponent: int) -> Callable[..., Any]:
    """x -> 1 - (1 - x)**exponent, for 0 <= x <= 1, without cancellation."""

    @intrinsic
    def complement(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            (x,) = args
            one = ir.Constant(x.type, 1.0)
            base = power = builder.fsub(one, x)
            result = x  # 1 - power, with the leading binary digits of the exponent
            for digit in f"{exponent:b}"[1:]:
                result = builder.fma(result, power, result)
                power = builder.fmul(power, power)
                if digit == "1":
                    result = builder.fma(result, base, x)
                    power = builder.fmul(power, base)
            return result if exponent else ir.Constant(x.type, 0.0)

        return x(x), codegen

    return complement


def _address(builder: ir.IRBuilder, pointer: Any, offset: Any, to: ir.Type) -> Any:
    return builder.bitcast(builder.gep(pointer, [offset]), to.as_pointer())


def _words(bits: int, count: int) -> tuple[int, int, int]:
    """How `count` elements are accessed: the bits of a word, words, and words of one access."""
    size = bits * count
    width = min(size, max(bits, 32))
    return width, size // width, min(size, 8 * WORD_BYTES) // width


def _load_if(builder: ir.IRBuilder, where: Any, bits: int, count: int, fill: int) -> list[Any]:
    """The words of adjacent elements, by predicated loads; of elements with the bits `fill` if the
    condition, the last of `where`, does not hold.
    """
    pointer, offset, condition = where
    width, words, at_once = _words(bits, count)
    register = _I64 if width == 64 else _I32
    fill = sum(fill << bits * i for i in range(width // bits))
    outputs = [f"${i}" for i in range(words)]
    lines = [f"mov.b{register.width} {each}, {fill:#x};" for each in outputs]
    for i in range(0, words, at_once):
        vector, operands = _vector(outputs[i : i + at_once])
        address = f"${words + 1}+{i * width // 8}"
        lines.append(f"@%if ld.global{vector}.b{width} {operands}, [{address}];")
    predicate = f".reg .pred %if; setp.ne.u32 %if, ${words}, 0;"
    result = register if words == 1 else ir.LiteralStructType([register] * words)
    arguments = [builder.zext(condition, _I32), _pointer_bits(builder, pointer, offset)]
    function = ir.FunctionType(result, [each.type for each in arguments])
    kind = "l" if width == 64 else "r"
    constraints = ",".join([*[f"=&{kind}"] * words, "r", "l", "~{memory}"])
    text = f"{{ {predicate} {' '.join(lines)} }}"
    loaded = builder.asm(function, text, constraints, arguments, True)
    found = [loaded] if words == 1 else [builder.extract_value(loaded, i) for i in range(words)]
    return [builder.trunc(each, ir.IntType(width)) for each in found] if width < 32 else found


def _elements(builder: ir.IRBuilder, words: list[Any], element: ir.Type, count: int) -> list[Any]:
    if len(words) == count:
        return [builder.bitcast(word, element) for word in words]
    vector = builder.bitcast(_packed(builder, words), ir.VectorType(element, count))
    return [builder.extract_element(vector, _I32(i)) for i in range(count)]


def _store(builder: ir.IRBuilder, pointer: Any, offset: Any, value: Any, bits: int) -> None:
    stored = ir.IntType(bits)
    address = _address(builder, pointer, offset, stored)
    builder.store(builder.bitcast(value, stored), address, align=bits // 8)


def _store_if(
    builder: ir.IRBuilder, condition: Any, pointer: Any, offset: Any, values: list[Any], bits: int
) -> None:
    """Stores adjacent values by one predicated instruction."""
    width, count, _ = _words(bits, len(values))
    packed = builder.bitcast(_packed(builder, values), ir.VectorType(ir.IntType(width), count))
    words = [builder.extract_element(packed, _I32(i)) for i in range(count)]
    vector, operands = _vector([f"${i + 2}" for i in range(count)])
    text = (
        "{ .reg .pred %if; setp.ne.u32 %if, $0, 0; "
        f"@%if st.global{vector}.b{width} [$1], {operands}; }}"
    )
    where = _pointer_bits(builder, pointer, offset)
    arguments = [builder.zext(condition, _I32), where, *words]
    function = ir.FunctionType(ir.VoidType(), [each.type for each in arguments])
    kinds = [{16: "h", 32: "r", 64: "l"}[width]] * count
    builder.asm(function, text, ",".join(["r", "l", *kinds, "~{memory}"]), arguments, True)


def _packed(builder: ir.IRBuilder, values: list[Any]) -> Any:
    """A vector of them."""
    vector = ir.Constant(ir.VectorType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        vector = builder.insert_element(vector, value, _I32(i))
    return vector


def _vector(operands: list[str]) -> tuple[str, str]:
    """The suffix and the operand of a PTX instruction that accesses them together."""
    if len(operands) == 1:
        return "", operands[0]
    return f".v{len(operands)}", f"{{{', '.join(operands)}}}"


def _pointer_bits(builder: ir.IRBuilder, pointer: Any, offset: Any) -> Any:
    return builder.ptrtoint(builder.gep(pointer, [offset]), _I64)


def _encoded(number: float, dtype: str) -> bytes:
    """In this dtype; exact for bfloat16 too, as float16 represents the number."""
    if dtype == "bfloat16":
        return struct.pack("<f", number)[2:]
    return struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[dtype], number)


def _widened(builder: ir.IRBuilder, number: Any, dtype: str) -> Any:
    if dtype == "float16":
        return builder.fpext(number, _F32)
    if dtype == "bfloat16":
        return builder.bitcast(builder.shl(builder.zext(number, _I32), _I32(16)), _F32)
    return number


def _narrowed(builder: ir.IRBuilder, number: Any, dtype: str) -> Any:
    if dtype == "float16":
        return builder.fptrunc(number, _F16)
    if dtype == "bfloat16":
        return _inline_asm(builder, "cvt.rn.bf16.f32 $0, $1;", _I16, "=h,f", number)
    return number


def _halves(builder: ir.IRBuilder, pair: Any, dtype: str) -> tuple[Any, Any]:
    """The numbers in a word as float32, the lower first; bfloat16 is the upper half of float32."""
    if dtype == "bfloat16":
        low, high = builder.shl(pair, _I32(16)), builder.and_(pair, _I32(0xFFFF0000))
        return builder.bitcast(low, _F32), builder.bitcast(high, _F32)
    low, high = (builder.trunc(bits, _I16) for bits in (pair, builder.lshr(pair, _I32(16))))
    return (
        _widened(builder, builder.bitcast(low, _F16), dtype),
        _widened(builder, builder.bitcast(high, _F16), dtype),
    )


def _pair(builder: ir.IRBuilder, low: Any, high: Any) -> Any:
    return _inline_asm(builder, "cvt.rn.bf16x2.f32 $0, $1, $2;", _I32, "=r,f,f", high, low)


def _exp(builder: ir.IRBuilder, x: Any) -> Any:
    if x.type == _F64:
        return _double_exp(builder, x)
    exponent = builder.fmul(x, ir.Constant(_F32, FLOAT32_LOG2_E))
    return _inline_asm(builder, "ex2.approx.ftz.f32 $0, $1;", _F32, "=f,f", exponent)


def _double_exp(builder: ir.IRBuilder, x: Any) -> Any:
    """With x = n log(2) + f. libdevice's exp and log are longer and have branches: loops with
    several of them are not unrolled.
    """
    # Rounds to a whole number n; the lowest bits are then n + 1023, the exponent of 2**n.
    shift = ir.Constant(_F64, 1.5 * 2.0**52 + 1023)
    shifted = builder.fma(x, ir.Constant(_F64, LOG2_E), shift)
    n = builder.fsub(shifted, shift)
    f = builder.fma(n, ir.Constant(_F64, -LOG_2), x)
    f = builder.fma(n, ir.Constant(_F64, -LOG_2_REST), f)
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, _I64), _I64(52)), _F64)
    result = builder.fmul(_polynomial(builder, f, EXP_COEFFICIENTS), power)
    tiny = builder.fcmp_ordered("<", x, ir.Constant(_F64, LEAST_EXPONENT))
    return builder.select(tiny, ir.Constant(_F64, 0.0), result)


def _absolute(builder: ir.IRBuilder, x: Any) -> Any:
    word, mask = (_I32, 2**31 - 1) if x.type == _F32 else (_I64, 2**63 - 1)
    return builder.bitcast(builder.and_(builder.bitcast(x, word), word(mask)), x.type)


def _negated(builder: ir.IRBuilder, x: Any) -> Any:
    return builder.fsub(ir.Constant(x.type, -0.0), x)  # NVVM knows no fneg


def _reciprocal(builder: ir.IRBuilder, x: Any) -> Any:
    if x.type == _F32:
        return _inline_asm(builder, "rcp.approx.ftz.f32 $0, $1;", _F32, "=f,f", x)
    one = ir.Constant(_F64, 1.0)
    crude = _inline_asm(builder, "rcp.approx.ftz.f64 $0, $1;", _F64, "=d,d", x)
    error = builder.fma(_negated(builder, x), crude, one)
    return builder.fma(crude, builder.fma(error, error, error), crude)


def _log(builder: ir.IRBuilder, x: Any) -> Any:
    """With x = 2**n (1 + f), 2/3 <= 1 + f < 4/3. lg2.approx is not accurate enough near 1."""
    if x.type == _F64:
        return _double_log(builder, x)
    bits = builder.sub(builder.bitcast(x, _I32), _I32(0x3F2AAAAB))  # minus the bits of 2/3
    exponent = builder.and_(bits, _I32(0xFF800000))  # n 2**23
    scale = builder.bitcast(builder.sub(_I32(0x3F800000), exponent), _F32)  # 2**-n
    f = builder.fma(x, scale, ir.Constant(_F32, -1.0))
    p = _polynomial(builder, f, LOG_COEFFICIENTS)
    result = builder.fma(p, builder.fmul(f, f), f)
    n, scaled_log_2 = builder.sitofp(exponent, _F32), ir.Constant(_F32, LOG_2 / 2**23)
    return builder.fma(n, scaled_log_2, result)


def _double_log(builder: ir.IRBuilder, x: Any) -> Any:
    """Likewise; with s = f / (2 + f), log(1 + f) = f - (f**2 / 2 - s (f**2 / 2 + s**2 p(s**2)))."""
    bits = builder.sub(builder.bitcast(x, _I64), _I64(0x3FE55555 << 32))  # 2/3 rounded down
    exponent = builder.and_(bits, _I64(-1 << 52))
    scale = builder.bitcast(builder.sub(_I64(0x3FF << 52), exponent), _F64)
    f = builder.fma(x, scale, ir.Constant(_F64, -1.0))
    s = builder.fmul(f, _reciprocal(builder, builder.fadd(f, ir.Constant(_F64, 2.0))))
    square = builder.fmul(s, s)
    half = builder.fmul(builder.fmul(f, ir.Constant(_F64, 0.5)), f)
    p = builder.fma(square, _polynomial(builder, square, ATANH_COEFFICIENTS), half)
    result = builder.fsub(f, builder.fma(_negated(builder, s), p, half))
    upper = builder.trunc(builder.lshr(exponent, _I64(32)), _I32)  # n 2**20
    n, scaled_log_2 = builder.sitofp(upper, _F64), ir.Constant(_F64, LOG_2 / 2**20)
    return builder.fma(n, scaled_log_2, result)


def _polynomial(builder: ir.IRBuilder, x: Any, coefficients: Sequence[float]) -> Any:
    """By Horner's rule; the constant coefficient is the first."""
    *lower, result = (ir.Constant(x.type, number) for number in coefficients)
    for number in reversed(lower):
        result = builder.fma(result, x, number)
    return result


def _is_whole(exponent: float) -> bool:
    """Whether a power takes no logarithm."""
    return exponent % 1 == 0 and 0 <= exponent < 2**31


def _whole_power(builder: ir.IRBuilder, x: Any, exponent: int) -> Any:
    result, square = None, x
    while exponent:
        if exponent % 2:
            result = square if result is None else builder.fmul(result, square)
        square = builder.fmul(square, square)
        exponent //= 2
    return ir.Constant(x.type, 1.0) if result is None else result


def _inline_asm(
    builder: ir.IRBuilder, text: str, result: ir.Type, constraints: str, *numbers: Any
) -> Any:
    """One PTX instruction without side effects."""
    function = ir.FunctionType(result, [number.type for number in numbers])
    return builder.asm(function, text, constraints, numbers, False)
