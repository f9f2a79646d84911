"""Calls on arrays that end exactly at an unreadable page, or begin right after one: a kernel that
reads or writes a byte beyond an array dies.

    python -m tests.guard_pages --n 20000 --seed 0

Inputs lie in read-only memory, too, and results are compared with those of the reference.
"""

import argparse
import collections
import ctypes
import mmap
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for `python -m tests.guard_pages`

import ml_dtypes
import numpy as np
from compare import assert_bitwise_equal, assert_close, kernel_rows

from dice_core import _reference, buffers
from dice_core import spec as specs

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
DTYPES = {name: np.dtype(name) for name in FLOATS + INTEGERS if name != "bfloat16"}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0, "float64": 0}
CHANNELS = (1, 2, 3, 5, 8, 9, 20, 105)
LAYOUTS = ("contiguous", "channels-last", "crop", "stride-2", "reversed", "any")
KINDS = ("sums", "gradient", "in place", "score")
COMPARED = 2000  # results of up to that many logits are compared, and every tenth beyond
ROOM = 32 << 20  # bytes for each array


class Pages:
    """Memory for one array at a time, between two unreadable pages."""

    libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, ROOM + 2 * mmap.PAGESIZE)
        self.first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + mmap.PAGESIZE
        self._protect(self.first - mmap.PAGESIZE, mmap.PAGESIZE, 0)
        self._protect(self.first + ROOM, mmap.PAGESIZE, 0)

    def _protect(self, address: int, size: int, access: int) -> None:
        if self.libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access):
            raise OSError(ctypes.get_errno(), "mprotect failed")

    def writable(self, yes: bool) -> None:
        self._protect(self.first, ROOM, mmap.PROT_READ | (mmap.PROT_WRITE if yes else 0))

    def array(self, shape: Shape, steps: list[int], dtype: str, at_end: bool) -> Array:
        """A writable array of undefined contents, its strides given in elements, whose last byte
        touches the unreadable page behind; else its first byte the one before.
        """
        size = DTYPES[dtype].itemsize
        spans = [(n - 1) * step * size for n, step in zip(shape, steps, strict=True)]
        low, high = sum(min(0, s) for s in spans), sum(max(0, s) for s in spans) + size
        assert high - low <= ROOM
        start = mmap.PAGESIZE + (ROOM - high if at_end else -low)
        self.writable(True)
        strides = [step * size for step in steps]
        return np.ndarray(shape, DTYPES[dtype], self.memory, start, strides)


def steps_of(layout: str, shape: Shape, rng: np.random.Generator) -> list[int]:
    """Strides in elements: one of LAYOUTS, or "broadcast", which only inputs may have."""
    axes = list(range(len(shape)))
    if layout == "channels-last" and len(shape) > 2:
        axes = [0, *axes[2:], 1]
    elif layout == "any":
        axes = rng.permutation(len(shape)).tolist()
    with_gaps = rng.integers(len(shape))
    steps, unit = [0] * len(shape), 1
    for axis in reversed(axes):
        if layout == "broadcast" and rng.integers(2):
            continue
        gaps = layout == "stride-2" or (layout == "any" and axis == with_gaps)
        back = layout == "reversed" or (layout == "any" and rng.integers(2))
        steps[axis] = (2 if gaps else 1) * (-unit if back else unit)
        unit *= shape[axis] * (2 if gaps else 1)
        unit += steps[axis] * rng.integers(4) if layout == "crop" else 0
    return steps


class Case:
    """One call, all of it drawn from a seed and a number."""

    def __init__(self, seed: int, number: int, pages: dict[str, Pages]) -> None:
        rng = self.rng = np.random.default_rng((seed, number))
        self.pages = pages
        self.row = self._one_of(kernel_rows())
        self.kind = self._one_of(KINDS)
        self.layouts: list[str] = []
        shape = self._shape()
        self.spec = self._spec()
        self.x = self._array("logits", shape, self._one_of(FLOATS), self._one_of(LAYOUTS))
        values = rng.standard_normal(shape, np.float32) * self._one_of((0.1, 3, 60))
        self.x[...] = np.abs(values) % 1 if self.spec.activation == "none" else values
        self.y = self._targets(shape)

    def __str__(self) -> str:
        return f"{self.row.name}, {self.kind}, {self.spec}\n" + "\n".join(self.layouts)

    def _one_of(self, values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def _shape(self) -> Shape:
        rng = self.rng
        near_a_tile = (rng.integers(980, 1050), 1023, 1024, 1025)
        voxels = int(rng.integers(1, 71) if rng.integers(8) else self._one_of(near_a_tile))
        columns = int(min(voxels, rng.integers(1, 18)))
        spatial = self._one_of(
            ((voxels,), (voxels // columns, columns), (1, columns, voxels // columns, 1))
        )
        channels = self._one_of(CHANNELS)
        return (int(rng.integers(1, 2 if channels > 20 else 4)), channels, *spatial)

    def _spec(self) -> specs.Spec:
        ignore_label = self._one_of((None, 0, 1, 120))
        if self.kind == "score":
            return specs.decision(self._one_of(("softmax", "sigmoid")), ignore_label)
        common = bool(self.rng.integers(2))  # softmax and the first four sums
        return specs.checked(
            ignore_label=ignore_label,
            p=self._one_of((1, 1, 2, 3)),
            gamma=self._one_of((None, 0, 2, 1.5)),
            activation="softmax" if common else self._one_of(specs.ACTIVATIONS),
            nll=not common and bool(self.rng.integers(2)),
            binary_gamma=None if common else self._one_of((None, 0, 1.5)),
            target_square=not common and bool(self.rng.integers(2)),
            targets=self._one_of(("soft", "binary")),
        )

    def _targets(self, shape: Shape) -> Array:
        """Class labels, or targets of x's shape; a few are ignored or out of range."""
        rng, classes = self.rng, self.spec.classes(shape[1])
        soft = classes == 1 or (shape[1] > 1 and not rng.integers(3))
        dtype = self._one_of(INTEGERS + FLOATS if soft else INTEGERS)
        if not soft:
            shape = (shape[0], *shape[2:])
        y = self._array("labels", shape, dtype, self._one_of((*LAYOUTS, "broadcast")))
        if soft and dtype in FLOATS and self.spec.targets == "soft":
            y[...] = rng.random(shape, np.float32)
        else:
            y[...] = rng.integers(0, 2 if soft or dtype == "bool" else classes, shape)
        if dtype != "bool" and not rng.integers(4):
            y[rng.random(shape) < 0.1] = self._one_of((0, 1, 119, 120))
        return y

    def _array(self, name: str, shape: Shape, dtype: str, layout: str) -> Array:
        at_end = bool(self.rng.integers(2))
        self.layouts.append(
            f"{name} {shape} {dtype} {layout}, at the {'end' if at_end else 'start'}"
        )
        return self.pages[name].array(shape, steps_of(layout, shape, self.rng), dtype, at_end)

    def run(self) -> bool:
        """Makes the call. Returns whether its result was compared with the reference's."""
        x, y, is_sum = self.x, self.y, self.kind in ("sums", "score")
        layouts = buffers.of(x, "x").layout, buffers.of(y, "y").layout
        seen = specs.signature(*layouts, self.spec)
        sums = self._array("sums", seen.sums_shape, "float64", "contiguous")
        if is_sum:
            result, sums[...] = sums, np.nan
        else:
            result, sums[...] = x, self.rng.standard_normal(sums.shape)  # the cotangent
        if self.kind == "gradient":
            result = self._array("gradient", x.shape, x.dtype.name, self._one_of(LAYOUTS))
            result[...] = np.nan

        def call(backend: Any, x: Array, y: Array, result: Array) -> int:
            logits, labels, out = (buffers.of(a, "array") for a in (x, y, result))
            if is_sum:
                found: int = backend.statistics(logits, labels, out, seen.spec, 1)
            else:
                at = buffers.of(sums, "sums")
                found = backend.gradient(logits, labels, at, out, seen.spec, 1)
            return found

        compared = x.size <= COMPARED or not self.rng.integers(10)
        if compared:
            wide = x.astype(np.float64)
            expected = np.empty_like(sums if is_sum else wide)
            targets = y.astype(np.float32) if y.dtype == DTYPES["bfloat16"] else y
            out_of_range = call(_reference, wide, targets, expected)
        for name, memory in self.pages.items():
            memory.writable({"logits": self.kind == "in place", "labels": False}.get(name, True))
        self.pages["sums"].writable(is_sum)
        found = call(self.row.load(), x, y, result)
        if compared:
            assert found == out_of_range
            self._compare(result, expected)
        return compared

    def _compare(self, actual: Array, expected: Array) -> None:
        if self.kind == "score":
            assert_bitwise_equal(actual, expected)
            return
        # Twenty times the tolerance of test_kernels.py: this tests that every number was
        # read and written, and options combined at random add up more rounding errors.
        dtype = self.x.dtype.name
        tolerance = 20 * (2e-14 if dtype == "float64" else 2e-6)
        tolerance *= max(self.spec.p, self.spec.gamma or 0, self.spec.binary_gamma or 0)
        rounding = 0.0 if self.kind == "sums" else 1.01 * ROUNDING[dtype]
        scale = max(1.0, float(np.max(np.abs(expected))))
        assert_close(actual, expected, rtol=tolerance + rounding, atol=tolerance * scale)


def run(seed: int, numbers: range, reached: mmap.mmap) -> collections.Counter[str]:
    """Runs these cases, and writes the number of each to `reached` before it is run. Returns how
    many there were of each kind.
    """
    pages = {name: Pages() for name in ("logits", "labels", "gradient", "sums")}
    counts: collections.Counter[str] = collections.Counter()
    for number in numbers:
        reached[:8] = number.to_bytes(8, "little")
        case = Case(seed, number, pages)
        if len(numbers) == 1:
            print(case, flush=True)
        counts["compared with the reference"] += case.run()
        counts[case.kind] += 1
        counts[f"backend {case.row.name}"] += 1
        counts[f"logits {case.x.dtype.name}"] += 1
        counts[f"targets {case.y.dtype.name}"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--n", type=int, default=20_000, help="number of calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.n)
    reached = mmap.mmap(-1, 8)
    child = os.fork()  # it may die
    if child == 0:
        try:
            counts = run(options.seed, numbers, reached)
            for name, count in sorted(counts.items()):
                print(f"{count:10,} {name}")
            print(f"{len(numbers):10,} calls", flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        number = int.from_bytes(reached[:8], "little")
        end = f"died of signal {-code}" if code < 0 else "failed"
        print(
            f"call {number} {end}; to repeat it: "
            f"python -m tests.guard_pages --seed {options.seed} --first {number} --n 1",
            file=sys.stderr,
        )
    return min(1, abs(code))


if __name__ == "__main__":
    sys.exit(main())
