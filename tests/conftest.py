"""Options of all tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated",
        choices=("some", "all"),
        help="run tests/gpu on an emulated GPU, with some or all cases of its large tables; "
        "without a CUDA device the default is some",
    )
