"""How a kernel is laid out for the logits, labels and sums of a call."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import Spec

THREADS = 256  # of a block
WARP = 32
WARPS = THREADS // WARP
ROUNDS = 64  # of loads that a thread makes at most, so that its sums stay exact enough,
BLOCKS = 1024  # fewer if there are not so many blocks,
RUN = 256  # but as many as make a block's sums small beside its logits
TABLE_BYTES = 40960  # of shared memory for several tables of a block's sums,
SHARED_BYTES = 49152  # and for one
BAD = 1  # columns of a partial beside the sums: how many bad labels
COUNTER_BYTES = 16  # before the partials: how many blocks of `total_kernel` are done
WORD_BYTES = 16  # of the widest load
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MAX_CHANNELS = 1024  # whose share of a lane still fits in its registers, of the usual sums
LANE_CLASSES, MORE = 16, 20  # that a lane has at most; from so many lanes on a few more
MORE_LANES = 8
HELD = 40  # words of scores of a thread: of more the compiler leaves loops, and arrays in memory
FOCAL_CLASSES = 2  # whose scores stand for what it unrolls besides where gamma is above 0
GENERAL_SUMS, GENERAL_HELD = 48, 16  # of the general kernels: sums of a lane; scores and targets
PLAIN = Spec()


@dataclass(frozen=True)
class Plan:
    """The constants of a kernel.

    - logits, labels: dtypes.
    - channels: of the logits.
    - spec: what to sum, but for the ignore label, which is an argument.
    - voxels: neighbouring ones of a thread, read together; 1 where they are not side by side.
    - lanes: of a warp, that share a voxel's channels.
    """

    logits: str
    labels: str
    channels: int
    spec: Spec = PLAIN
    voxels: int = 1
    lanes: int = 1

    @property
    def classes(self) -> int:
        """C of the statistics."""
        return self.spec.classes(self.channels)

    @property
    def sums(self) -> int:
        """K of the statistics."""
        return len(self.spec.statistics)

    @property
    def share(self) -> int:
        """The most channels of one lane."""
        return -(-self.channels // self.lanes)

    @property
    def columns(self) -> int:
        """Numbers of a block's partial: the sums of every class, and the bad labels."""
        return self.sums * self.classes + BAD

    @property
    def step(self) -> int:
        """Voxels that a block reads at a time."""
        return THREADS // self.lanes * self.voxels

    def run(self, samples: int, voxels: int) -> int:
        """Voxels of a block, of so many samples of so many voxels."""
        rounds = samples * voxels // (self.step * BLOCKS)
        return self.step * max(1, min(rounds, ROUNDS), RUN // self.step)


def plan(logits: str, labels: str, channels: int, spec: Spec, side_by_side: int) -> Plan:
    """The plan for logits and labels of these dtypes.

    `side_by_side`: so many voxels, a power of two, can be read and written as whole words.
    """
    lanes = 1
    while lanes < WARP and channels > lanes * _lane_classes(spec, lanes):
        lanes *= 2
    share = -(-spec.classes(channels) // lanes)
    if spec.plain:
        held, most = share + (FOCAL_CLASSES if spec.gamma else 0), HELD
    else:
        turns = 2 if spec.softmax or spec.classes(channels) > channels else 1
        held, most = share * turns * (1 + spec.dense), GENERAL_HELD
    held *= max(1, ITEMSIZE[logits] // 4)  # words, of each voxel
    voxels = min(side_by_side, WORD_BYTES // ITEMSIZE[logits])
    while voxels > 1 and held * voxels > most:
        voxels //= 2
    return Plan(logits, labels, channels, spec, voxels, lanes)


def most_channels(logits: str, spec: Spec) -> int:
    """So many, and a block's sums fit in shared memory."""
    columns = SHARED_BYTES // max(4, ITEMSIZE[logits])
    return min(MAX_CHANNELS, (columns - BAD) // len(spec.statistics))


def _lane_classes(spec: Spec, lanes: int) -> int:
    """The most that a lane has."""
    if not spec.plain:
        return GENERAL_SUMS // len(spec.statistics)
    return LANE_CLASSES if lanes < MORE_LANES else MORE
