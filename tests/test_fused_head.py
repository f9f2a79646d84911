"""examples/fused_head.py: the fused head trains as the ordinary loss does."""

import importlib.util
from pathlib import Path

import pytest
import torch
from compare import assert_close

SCRIPT = Path(__file__).parents[1] / "examples" / "fused_head.py"
pytest.importorskip("resource", reason="Linux and macOS alone count a process's memory so")


@pytest.mark.parametrize(
    ("network", "package"), [("nnunet", "dynamic_network_architectures"), ("monai", "monai")]
)
def test_both_train_alike(network, package):
    pytest.importorskip(package, reason=f"needs {package}")
    spec = importlib.util.spec_from_file_location("fused_head", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a volume more would only wait
    ordinary, fused = (
        example.train(way, network, side=16, classes=4, steps=4)["losses"]
        for way in ("ordinary", "fused")
    )
    torch.set_num_threads(threads)
    assert_close(fused, ordinary, rtol=1e-4)
    assert fused[-1] < fused[0]
