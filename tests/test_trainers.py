"""The examples of docs/howto/trainers.md run, and train."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "howto" / "trainers.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))
NEEDS = {
    "Lightning": ("lightning",),
    "MONAI": ("monai", "ignite"),
    "Hugging Face": ("transformers", "accelerate"),
}
LIMIT = 240  # seconds, most of which are imports


def test_every_example_is_tested():
    assert set(EXAMPLES) == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_trainer(name, tmp_path):
    for library in NEEDS[name]:
        if not importlib.util.find_spec(library):
            pytest.skip(f"needs {library}, of the extra trainers")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:dice_core", "-c", EXAMPLES[name]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loss = float(done.stdout.split()[-1])
    assert 0 < loss < 1.5, loss  # 1.8 before training
