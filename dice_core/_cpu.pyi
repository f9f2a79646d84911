from typing import Any

from dice_core.buffers import Buffer
from dice_core.spec import Signature, Spec

LEVEL: str

def statistics(logits: Buffer, labels: Buffer, sums: Buffer, spec: Spec, threads: int) -> int: ...
def loss(
    logits: Buffer,
    labels: Buffer,
    value: Buffer,
    derivative: Buffer | None,
    spec: Spec,
    ratio: tuple[Any, ...],
    weight: Buffer | None,
    threads: int,
) -> int: ...
def gradient(
    logits: Buffer, labels: Buffer, cotangent: Buffer, grad: Buffer, spec: Spec, threads: int
) -> int: ...
def elementwise(name: str, x: Buffer, out: Buffer) -> None: ...
def unsupported(signature: Signature) -> list[str]: ...
def processor_runs(level: str) -> bool: ...
def openmp() -> tuple[int, str]: ...
