"""Losses and scores over several processes: see `distributed_scenarios`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dice_core.torch

SCENARIOS = Path(__file__).parent / "distributed_scenarios.py"
EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"
LIMIT = 240  # seconds, many times what is needed; a rank that waits for another would wait longer
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch is built without gloo",
)


def run(*arguments):
    """What the processes printed; asserts that all ended well, in time."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


def test_two_processes():
    assert "passed" in run(SCENARIOS, 2)


@pytest.mark.slow
def test_three_processes():
    names = ["batches_of_any_size", "subgroups", "data_parallel", "scores", "sharded"]
    assert "passed" in run(SCENARIOS, 3, *names)


def test_without_a_process_group():
    x, y = torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.uint8)
    criterion = dice_core.torch.DiceLoss(process_group="world")
    score = dice_core.torch.DiceScore(process_group="world")
    score.update(x, y)
    for function in (lambda: criterion(x, y), score.compute):
        with pytest.raises(RuntimeError, match="init_process_group to be called first"):
            function()


@pytest.mark.slow
def test_the_example():
    """Each line has the loss of two processes beside that of one, which agree."""
    out = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", EXAMPLE)
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    curves = [(float(two), float(one)) for _, two, one in rows]
    assert len(curves) >= 10
    assert all(two == pytest.approx(one, rel=1e-4) for two, one in curves)
    assert curves[-1][0] < 0.5 * curves[0][0]
