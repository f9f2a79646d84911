"""The suite of a machine with an NVIDIA GPU, `pytest tests/gpu`; skipped on others."""

import warnings

import pytest
import torch

from dice_core import backends


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A CUDA device, without which the test is skipped."""
    if torch.version.cuda is None:
        pytest.skip(f"no CUDA device: torch {torch.__version__} is built without CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where there is a driver and no device
        there = torch.cuda.is_available()
    if not there:
        pytest.skip("no CUDA device: torch finds none, see whether nvidia-smi does")
    monkeypatch.delenv(backends.CHECK, raising=False)
