"""examples/tutorial.ipynb: a notebook that was executed from first to last cell without errors.

The build of the documentation executes it anew.
"""

import ast
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"
NOTEBOOK = json.loads(PATH.read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_format():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) >= (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    identifiers = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identifiers)) == len(identifiers) > 20


def test_executed_in_order():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))


def test_outputs():
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not [each for each in outputs if each["output_type"] == "error"]
    assert not [each["text"] for each in outputs if each.get("name") == "stderr"]
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 4
    assert PATH.stat().st_size < 400_000


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell["id"])
def test_cells(cell):
    """Each is Python, short, and either prints, draws or defines something."""
    source = "".join(cell["source"])
    assert len(source.splitlines()) <= 36
    body = ast.parse(source).body
    defines = any(isinstance(each, (ast.FunctionDef, ast.ClassDef)) for each in body)
    assert cell["outputs"] or defines
