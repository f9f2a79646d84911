"""The Plan of a call, for which a kernel is compiled; the Arguments with which it is launched."""

from __future__ import annotations

import operator
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..spec import Spec

THREADS = 256  # per block
WARP = 32
WARPS = THREADS // WARP
# Loads per thread. The upper bound keeps a thread's float32 sums accurate; there are fewer until
# the input is large enough for BLOCKS blocks; MIN_RUN voxels keep a block's partial small relative
# to the logits it reads.
MAX_ROUNDS, BLOCKS, MIN_RUN = 64, 1024, 256
SHARED_BYTES = 49152  # of a block, without opting in to more
TABLES_BYTES = 40960  # for tables of sums of several warps; a single table may use SHARED_BYTES
COUNTER_BYTES = 16  # before the partials: the number of finished blocks of the totals kernel
WORD_BYTES = 16  # of the widest load
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MAX_CHANNELS = 1024

# Registers. Beyond these budgets, determined by compiling, the compiler does not unroll loops and
# puts the arrays they index into local memory.
LANE_CLASSES, LANE_CLASSES_OF_MANY, MANY_LANES = 16, 20, 8  # plain sums: classes per lane
GENERAL_LANE_SUMS = 48  # other sums: classes per lane times sums
# 32-bit values per thread: plain sums of one lane, of several, whose words are of few voxels, so
# that wide ones count for more than many warps; and other sums.
REGISTER_BUDGET, LANES_REGISTER_BUDGET, GENERAL_REGISTER_BUDGET = 40, 56, 16
FOCAL_VALUES = 2  # the share of the focal modulation in that budget
WORD_EXCESS = 9 / 8  # at most so many times the channels per lane for whole words of channels
THREE_BLOCKS_BUDGET, TWO_BLOCKS_BUDGET = 40, 100  # for so many blocks on a multiprocessor

PLAIN = Spec()


@dataclass(frozen=True)
class Plan:
    """The constants of a kernel.

    - logits, labels: dtypes.
    - channels: of the logits.
    - spec: what to sum, without the ignore label, which is an argument.
    - voxels: that a thread processes at a time.
    - lanes: adjacent lanes of a warp that share a voxel, each with its part of the classes.
    - contiguous: the axis along which numbers are adjacent in the logits, the gradient and soft
      targets, "voxels" or "channels"; labels are along voxels in either case. "" if neither.
    - word: adjacent numbers that a thread loads or stores together, of that axis.
    """

    logits: str
    labels: str
    channels: int
    spec: Spec = PLAIN
    voxels: int = 1
    lanes: int = 1
    contiguous: str = "voxels"
    word: int = 1

    @property
    def classes(self) -> int:
        """C of the sums."""
        return self.spec.classes(self.channels)

    @property
    def label_limit(self) -> int:
        """Labels below it are classes. A byte of a bool other than 0 and 1 is out of range."""
        return min(self.classes, 2) if self.labels == "bool" else self.classes

    @property
    def fields(self) -> int:
        """K of the sums."""
        return len(self.spec.fields)

    @property
    def word_voxels(self) -> int:
        """Voxels of a word."""
        return self.word if self.contiguous == "voxels" else 1

    @property
    def word_channels(self) -> int:
        """Channels of a word."""
        return self.word if self.contiguous == "channels" else 1

    @property
    def word_targets(self) -> int:
        """Labels or soft targets of a word."""
        return self.word if self.spec.soft_targets else self.word_voxels

    @property
    def word_step(self) -> int:
        """Values of a thread, (classes, voxels), from one number of a word to the next."""
        return self.voxels if self.contiguous == "channels" else 1

    @property
    def lane_channels(self) -> int:
        """Channels per lane, whole words; the last lanes may have fewer, or none."""
        words = -(-self.channels // self.word_channels)
        return -(-words // self.lanes) * self.word_channels

    @property
    def background(self) -> int:
        """1: a single channel has a class 0 with logit 0 before it."""
        return self.classes - self.channels

    @property
    def lane_classes(self) -> int:
        """Classes per lane."""
        return self.lane_channels + self.background

    @property
    def factor_width(self) -> int:
        """Numbers in a row of the cotangent in shared memory: classes, padded to whole lanes."""
        return self.lanes * self.lane_classes

    @property
    def factor_rows(self) -> int:
        """Rows of the cotangent in shared memory: sums that depend on the logits."""
        soft = self.spec.soft_targets
        return self.fields - 1 - soft - (soft and self.spec.target_square)

    @property
    def columns(self) -> int:
        """Numbers in a block's partial: its sums."""
        return self.fields * self.classes

    @property
    def table(self) -> int:
        """Numbers in a table of sums in shared memory: the classes are padded to whole lanes."""
        return self.fields * self.lanes * self.lane_classes

    def resident_blocks(self, kind: str) -> int:
        """How many blocks of this kind of kernel a multiprocessor shall hold at least: the more,
        the fewer registers a thread has, which must not be spilled.
        """
        spec, values = self.spec, self.lane_classes * self.voxels
        if not spec.plain or self.logits == "float64" or not self.contiguous:
            return 1
        if kind == "statistics":
            return 2 if values + self.fields * self.lane_classes <= TWO_BLOCKS_BUDGET else 1
        if self.word < self.voxels:
            values += 2 * self.lane_channels  # the addresses of several words each
        few = self.contiguous == "voxels" and values <= THREE_BLOCKS_BUDGET
        return 3 if few and self.lanes == 1 and spec.p == 1 and not spec.gamma else 2

    @property
    def spacing(self) -> int:
        """Voxels from one word of a thread to its next, between which are those of its block."""
        return THREADS // self.lanes * self.word_voxels

    @property
    def step(self) -> int:
        """Voxels that a block loads at a time."""
        return THREADS // self.lanes * self.voxels

    @property
    def tables(self) -> int:
        """Tables of sums in shared memory: one per warp, or fewer that warps use in turn."""
        tables, size = WARPS, self.table * max(4, ITEMSIZE[self.logits])
        while tables > 1 and tables * size > TABLES_BYTES:
            tables //= 2
        return tables

    def run(self, samples: int, voxels: int) -> int:
        """Voxels per block, for this many samples of this many voxels."""
        rounds = samples * voxels // (self.step * BLOCKS)
        return self.step * max(1, min(rounds, MAX_ROUNDS), MIN_RUN // self.step)


def itemsize(dtype: str) -> int:
    """Bytes of a number of any dtype of logits, labels or soft targets."""
    if dtype in ITEMSIZE:
        return ITEMSIZE[dtype]
    return 1 if dtype == "bool" else int(dtype.lstrip("uint")) // 8


def plan(
    logits: str,
    labels: str,
    channels: int,
    spec: Spec,
    voxels: int,
    contiguous: str = "voxels",
    adjacent: int = WORD_BYTES,
) -> Plan:
    """The plan for logits and labels of these dtypes, and samples of this many voxels.

    `contiguous`: that of the plan. `adjacent`: how many numbers of that axis, a power of two, can
    be accessed as whole words.
    """
    lanes = 1
    while lanes < WARP and channels > lanes * _lane_classes(spec, lanes):
        lanes *= 2
    values = -(-spec.classes(channels) // lanes)
    if spec.plain:
        values += FOCAL_VALUES if spec.gamma else 0
        wide = lanes > 1 and spec.gamma is None and contiguous == "voxels" and adjacent > 2
        budget = LANES_REGISTER_BUDGET if wide else REGISTER_BUDGET
    else:
        passes = 2 if spec.needs_softmax or spec.classes(channels) > channels else 1
        values, budget = values * passes * (1 + spec.soft_targets), GENERAL_REGISTER_BUDGET
        if logits == "float64" and (spec.gamma or 0) % 1:  # long: such powers take a logarithm
            budget //= 2
    values *= max(1, ITEMSIZE[logits] // 4)  # per voxel
    of_word = WORD_BYTES // ITEMSIZE[logits]
    of_thread = of_word
    while of_thread > 1 and values * of_thread > budget:
        of_thread //= 2
    while of_thread > 1 and THREADS // lanes * of_thread >= 2 * voxels:  # most would have none
        of_thread //= 2
    found = Plan(logits, labels, channels, spec, of_thread, lanes, contiguous)
    word = min(adjacent, of_word if contiguous == "channels" else of_thread)
    sums = SHARED_BYTES // max(4, ITEMSIZE[logits])  # of a table
    most = min(found.lane_channels * WORD_EXCESS, sums // (found.fields * lanes))
    while word > 1 and replace(found, word=word).lane_channels > most:
        word //= 2
    return replace(found, word=word)


def most_channels(logits: str, spec: Spec) -> int:
    """The most channels whose sums fit into a block's shared memory, and a lane's registers."""
    sums = SHARED_BYTES // max(4, ITEMSIZE[logits])
    return min(MAX_CHANNELS, sums // len(spec.fields) // WARP * WARP)


def _lane_classes(spec: Spec, lanes: int) -> int:
    if not spec.plain:
        return GENERAL_LANE_SUMS // len(spec.fields)
    return LANE_CLASSES if lanes < MANY_LANES else LANE_CLASSES_OF_MANY


class Arguments:
    """The arguments of a kernel by name, in order, 64 bits each.

    Their kinds are ADDRESS, INTEGER (flags too) and NUMBER. Both the compiled signature and the
    packing of a launch are derived from this; a test compares it with the kernels' own parameter
    lists.
    """

    def __init__(self, **kinds: str) -> None:
        self.kinds = kinds
        self.format = "".join(_FORMATS[kind] for kind in kinds.values())
        self._ordered = operator.itemgetter(*kinds)

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """A launch's parameters. Raises TypeError unless there is exactly a value for each."""
        if values.keys() != self.kinds.keys():
            wrong = ", ".join(sorted(values.keys() ^ self.kinds.keys()))
            raise TypeError(f"missing or unknown arguments: {wrong}")
        return struct.pack(self.format, *self._ordered(values))


ADDRESS, INTEGER, NUMBER = "address", "integer", "number"
_FORMATS = {ADDRESS: "q", INTEGER: "q", NUMBER: "d"}
