"""examples/monai_training.py: MONAI's training script and the same one with another import line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "monai_training.py"
THEIRS, OURS = "from monai.losses import", "from dice_core.compat.monai import"
pytest.importorskip("monai", reason="needs monai, of the extra dev")
pytest.importorskip("resource", reason="Linux and macOS alone count a process's memory so")


@pytest.mark.slow
def test_both_losses_train_alike():
    losses, text = [], SCRIPT.read_text()
    assert text.count(f"\n{THEIRS}") == 1
    for line in (THEIRS, OURS):
        source = text.replace(f"\n{THEIRS}", f"\n{line}", 1)
        command = [sys.executable, "-W", "error::UserWarning:dice_core", "-c", source]
        done = subprocess.run(
            [*command, "3", "16", "4"], check=True, capture_output=True, text=True
        )
        losses.append(re.search(r"last loss (\S+)", done.stdout)[1])
    assert losses[0] == losses[1]
    assert float(losses[0]) > 0
