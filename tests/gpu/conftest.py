"""Tests of the library on an NVIDIA GPU, `pytest tests/gpu`.

Without one they run on an emulated device (`emulated`): a few by default, more with `-m slow`, all
that can with `--emulated all`.
"""

import functools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dice_core import calls

HERE = Path(__file__).parent
STREAMS = "torch's streams are not emulated"
GRAPHS = "CUDA graphs are not emulated"
NOT_EMULATED = {
    "test_two_concurrent_streams_are_bitwise_equal": STREAMS,
    "test_other_work_on_the_device_does_not_change_results": STREAMS,
    "test_work_goes_on_the_current_stream": STREAMS,
    "test_backward_runs_on_the_stream_of_forward": STREAMS,
    "test_nothing_synchronizes": STREAMS,
    "test_torch_sees_no_synchronization": STREAMS,
    "test_a_captured_step_replays_on_changed_inputs": GRAPHS,
    "test_a_graphed_module": GRAPHS,
    "test_precompile_leaves_nothing_to_compile": "processes of their own have no emulated device",
    "test_operators_are_well_formed": "torch's opcheck takes no stand-ins for its tensors",
    "test_a_step_takes_one_gradient_and_forward_keeps_nothing": "torch's allocator is not emulated",
    "test_autocast_and_grad_scaler": "torch's mixed precision on CUDA is not emulated",
    "test_compiled_whole": "torch.compile takes no stand-ins for its tensors",
    "test_host_cost_of_a_step_is_reported": "the time would be that of the emulation",
    "test_more_elements_than_31_bits_count": "would take hours",
}
# Of the cases of a test, the first of every so many; other tests have all of them.
EVERY = {
    "test_sums_and_their_gradient": 23,
    "test_loss_and_its_gradient": 37,
    "test_the_gradient_in_place_is_the_same": 7,
    "test_ignored_voxels_contribute_nothing_whatever_their_logits": 13,
    "test_labels": 29,
    "test_soft_targets": 41,
    "test_every_run_is_bitwise_equal": 5,
    "test_gradient_has_the_dtype_and_strides_of_the_logits": 4,
}
QUICK = {  # in every run; others are slow
    "test_loss_and_gradient[Emulated-float16]",
    "test_loss_and_its_gradient[None--1-0.0-mean-float16]",
}


@functools.cache
def no_device() -> str:
    """Why there is no CUDA device; empty if there is one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if there is a driver but no device
        if not torch.cuda.is_available():
            return "torch finds none; check whether nvidia-smi lists one"
    return ""


def emulated(config: pytest.Config) -> str:
    """Which cases run on the emulated device: some, all; none if it is empty."""
    return config.getoption("emulated") or ("some" if no_device() else "")


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    which, seen = emulated(config), Counter[str]()
    if not which:
        return
    left_out = []
    for item in items:
        if HERE not in item.path.parents:
            continue
        name = re.sub(r"\[.*", "", item.name)
        seen[name] += 1
        if name in NOT_EMULATED:
            reason = f"no CUDA device: {no_device()}; {NOT_EMULATED[name]}"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif which == "some" and (seen[name] - 1) % EVERY.get(name, 1):
            left_out.append(item)
        elif item.name not in QUICK:
            item.add_marker(pytest.mark.slow)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def kernels_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of compiled kernels; all of pytest's processes share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA device, or the emulated one."""
    monkeypatch.delenv(calls.CHECK, raising=False)
    if not emulated(request.config):
        yield
        return
    if find_spec("numba_cuda") is None:
        pytest.skip(f"no CUDA device: {no_device()}; the emulated one needs the extra gpu")
    from emulated import device

    with device.installed(request.getfixturevalue("kernels_folder")):
        yield
