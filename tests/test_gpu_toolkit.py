"""Which CUDA toolkit compiles the kernels, and the remedy for one that is newer than the driver."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from dice_core.gpu import toolkit

COMMANDS = (
    "replace the compiler: pip uninstall -y nvidia-nvjitlink nvidia-nvvm nvidia-cuda-nvrtc "
    'nvidia-cuda-runtime nvidia-cuda-cccl && pip install "dice_core[gpu-cu12]"'
)


@pytest.fixture
def packages(monkeypatch):
    """The versions of the packages that pip installed."""
    installed = {"cuda-bindings": "13.5.0"}
    monkeypatch.setattr(toolkit, "version", installed.get)
    toolkit.linker.cache_clear()
    yield installed
    toolkit.linker.cache_clear()


@pytest.fixture
def library(monkeypatch):
    """A stand-in for cuda.bindings.nvjitlink, whose `version` a test replaces."""
    bindings, nvjitlink = ModuleType("cuda.bindings"), ModuleType("cuda.bindings.nvjitlink")
    bindings.nvjitlink = nvjitlink
    for module in (ModuleType("cuda"), bindings, nvjitlink):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def version():
        raise AssertionError("pip knows the version: the library need not be loaded")

    nvjitlink.version = version
    return nvjitlink


def built_for(monkeypatch, cuda):
    torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "torch", torch)


@pytest.mark.parametrize(
    ("package", "version", "linker"),
    [("nvidia-nvjitlink", "13.5.37", (13, 5)), ("nvidia-nvjitlink-cu12", "12.9.86", (12, 9))],
)
def test_pip_knows_the_linker(packages, library, package, version, linker):
    packages[package] = version
    assert toolkit.linker() == linker


@pytest.mark.parametrize("installed", [{}, dict.fromkeys(toolkit.LINKERS, "13.5.37")])
def test_the_linker_itself_is_asked_if_pip_knows_none_or_two(packages, library, installed):
    packages |= installed
    library.version = lambda: (12, 9)
    assert toolkit.linker() == (12, 9)


def test_no_linker(packages, library):
    def version():
        raise RuntimeError('Failure finding "libnvJitLink.so"')

    library.version = version
    assert toolkit.linker() is None
    toolkit.linker.cache_clear()
    del packages["cuda-bindings"]
    del library.version
    assert toolkit.linker() is None


@pytest.mark.parametrize(
    ("driver", "of_torch", "extra"),
    [(12, None, 12), (13, None, 13), (14, None, 13), (13, "12.8", 12), (12, "13.0", 12)],
)
def test_the_extra_is_that_of_driver_and_torch(monkeypatch, driver, of_torch, extra):
    built_for(monkeypatch, of_torch)
    assert toolkit.install(driver) == f'pip install "dice_core[gpu-cu{extra}]"'


def test_without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert toolkit.install(13) == 'pip install "dice_core[gpu-cu13]"'


@pytest.mark.parametrize("of_torch", [None, "12.8"])
def test_a_compiler_is_replaced(monkeypatch, of_torch):
    built_for(monkeypatch, of_torch)
    assert toolkit.replace(12) == COMMANDS


def test_torch_is_not_left_without_its_libraries(monkeypatch):
    """Those of a build of torch for CUDA 13 are the packages that would be uninstalled."""
    built_for(monkeypatch, "13.0")
    assert toolkit.replace(12) == (
        "make a new environment, with a build of torch for CUDA 12 (this one is for CUDA 13): "
        'pip install "dice_core[gpu-cu12]"'
    )
