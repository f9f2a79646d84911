"""Every test of the CUDA kernels with their PTX: some 180 are compiled, which takes minutes."""

import pytest

pytest.importorskip("numba_cuda", reason="needs the extra gpu")
import gpu_ptx
import test_gpu_kernels
from test_gpu_kernels import *  # noqa: F403

# These change the operations that the simulator runs.
del test_the_comparison_detects_faults  # noqa: F821
del test_bitwise_reproducible_in_any_order_of_threads_and_blocks  # noqa: F821

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu_ptx.install(monkeypatch)
    test_gpu_kernels.short_runs(monkeypatch)
