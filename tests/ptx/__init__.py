"""An executor of PTX, the assembly that the CUDA kernels compile to, in NumPy.

It executes exactly what `dice_core.gpu.compile.ptx` returns, on host memory, and checks what no GPU
reports: each access, the initialization of registers and of shared memory, barriers and shuffles,
and races between threads and between blocks. It knows the instructions that occur there, and
refuses others when it reads them.

- `module` parses, `flow` finds basic blocks and registers that may be read before written.
- `arithmetic` has the operations on registers, `rounding` those that NumPy rounds differently.
- `memory` has address spaces, `races` what orders the accesses to them.
- `decode` turns instructions into Python functions, `machine` schedules threads and blocks.
"""

from .faults import Fault
from .machine import Kernel, launch

__all__ = ["Fault", "Kernel", "launch"]
