"""`dice_core.jax`: each group of scenarios in a process of its own, with a time limit, since a
callback that waits for JAX's own runtime would hang.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = Path(__file__).parent / "jax_scenarios.py"
LIMIT = 60  # seconds, many times what is needed
has_jax = pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="needs jax")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")


def run(*arguments, **environment):
    """What a new interpreter printed; asserts that it ended well, in time."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


@has_jax
@pytest.mark.parametrize(
    "names",
    [
        "terms derivative_in_float64 half_precision_scale",
        "options dtypes threads compiled_once",
        "transforms vmap scan",
        "refusals labels_out_of_range device_buffers",
    ],
)
def test_jax(names):
    run(SCENARIOS, *names.split())


@has_jax
@on_linux
def test_one_core():
    run(SCENARIOS, "one_core")


@has_jax
@on_linux
def test_a_step_grows_by_one_gradient():
    run(SCENARIOS, "memory")


@has_jax
def test_two_devices():
    run(SCENARIOS, "sharded", XLA_FLAGS="--xla_force_host_platform_device_count=2")


WITHOUT_JAX = """
import sys
sys.modules["jax"] = None  # as if it were not installed
import dice_core
assert "jax" not in dir(dice_core)
assert not hasattr(dice_core, "jax")
try:
    import dice_core.jax
except ImportError as error:
    print(error)
"""


def test_without_jax():
    needed = 'dice_core.jax needs JAX 0.6.2 or later: pip install "dice_core[jax]"\n'
    assert run("-W", "error", "-c", WITHOUT_JAX) == needed
