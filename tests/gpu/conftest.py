"""Tests that need an NVIDIA GPU, `pytest tests/gpu`; without one they are skipped."""

import warnings

import pytest
import torch

from dice_core import calls


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test, with the reason, where there is no CUDA device."""
    if torch.version.cuda is None:
        pytest.skip(f"no CUDA device: torch {torch.__version__} is built without CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if there is a driver but no device
        available = torch.cuda.is_available()
    if not available:
        pytest.skip("no CUDA device: torch finds none; check whether nvidia-smi lists one")
    monkeypatch.delenv(calls.CHECK, raising=False)
