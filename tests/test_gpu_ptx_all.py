"""The PTX of every kind of kernel against the reference: a hundred are compiled, in minutes."""

import pytest

pytest.importorskip("numba_cuda", reason="needs the extra gpu")
import gpu_ptx
import test_gpu_kernels
from test_gpu_kernels import (  # noqa: F401
    test_a_scale_multiplies_the_cotangent,
    test_against_the_reference,
    test_empty_arrays,
    test_labels_out_of_range_make_their_sample_nan,
    test_the_loss_follows_in_the_second_launch,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu_ptx.install(monkeypatch)
    test_gpu_kernels.short_runs(monkeypatch)
