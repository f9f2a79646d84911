"""What reaches NVIDIA's driver, played by a stub that writes it down; how kernels are kept."""

import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dice_core
from dice_core import _gpu, _gpu_cache, _gpu_driver, _gpu_kernels, backends, buffers, spec
from dice_core._gpu_plan import Plan

STUB = Path(__file__).parent / "stub_driver.c"
PLAN = Plan("float16", "uint8", 4, voxels=8)
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler for the stub")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", path, STUB], check=True)
    return path


@pytest.fixture
def driver(library, monkeypatch, tmp_path):
    """The stub in the driver's place; call it for what it wrote down."""
    log = tmp_path / "log"

    def calls():
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return lines

    monkeypatch.setenv("STUB_LOG", str(log))
    monkeypatch.setattr(_gpu_driver, "LIBRARY", str(library))
    monkeypatch.setenv(_gpu_cache.VARIABLE, str(tmp_path / "cache"))
    forget()
    yield calls
    forget()


def forget():
    for found in (
        _gpu_driver._driver,
        _gpu_driver._context,
        _gpu_driver._handle,
        _gpu_driver.capability,
        _gpu_driver.name,
        _gpu._kernel,
        _gpu_cache._origin,
    ):
        found.cache_clear()


@needs_compiler
class TestLaunch:
    def test_grid_block_stream_and_arguments(self, driver):
        kernel = _gpu_driver.load(b"\x7fELF and so on", "kernel", "2qd")
        assert driver() == ["cuInit 0", "cuLibraryLoadData 464c457f", "cuLibraryGetKernel 1"]
        kernel.launch(1, 77, 2**31 - 1, 256, 2**63 - 1, -1, 0.5)
        half = struct.unpack("<Q", struct.pack("<d", 0.5))[0]
        assert driver() == [
            "cuDevicePrimaryCtxRetain 41",
            "cuCtxPushCurrent_v2 1041",
            f"cuLaunchKernel blocks {2**31 - 1} threads 256",
            f"  kernel 8 context 1041 stream 77: {2**63 - 1:x} {2**64 - 1:x} {half:x}",
            "cuCtxPopCurrent_v2",
        ]

    def test_a_kernel_is_made_ready_in_its_context(self, driver):
        kernel = _gpu_driver.load(b"\x7fELF", "kernel", "")
        driver()
        kernel.make_ready(1)
        assert driver()[1:] == [
            "cuCtxPushCurrent_v2 1041",
            "cuKernelGetFunction 8",
            "cuCtxPopCurrent_v2",
        ]

    def test_the_context_is_left_as_it_was(self, driver):
        kernel = _gpu_driver.load(b"\x7fELF", "kernel", "")
        with _gpu_driver._Current(0):  # as in a process that uses torch
            driver()
            kernel.launch(0, 0, 1, 256)
            assert [line.split()[0] for line in driver()] == ["cuLaunchKernel", "kernel"]
            kernel.launch(1, 0, 1, 256)
            assert "cuCtxPushCurrent_v2 1041" in driver()
            kernel.launch(0, 0, 1, 256)
            assert "context 1040" in driver()[1]

    def test_another_stream_is_waited_for(self, driver):
        _gpu_driver.wait(0, 5, 5)
        _gpu_driver.wait(0, 0, 1)
        assert driver() == []
        _gpu_driver.wait(0, 5, 6)
        waited = [line for line in driver() if "Event" in line]
        assert waited == [
            "cuEventCreate 2",
            "cuEventRecord 6",
            "cuStreamWaitEvent 5",
            "cuEventDestroy_v2",
        ]

    def test_an_error_has_its_name_and_the_context_is_put_back(self, driver, monkeypatch):
        kernel = _gpu_driver.load(b"\x7fELF", "kernel", "")
        monkeypatch.setenv("STUB_FAILS", "cuLaunchKernel")
        with pytest.raises(
            _gpu_driver.DriverError,
            match=r"cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS: .* \(CUDA error 700\)",
        ):
            kernel.launch(0, 0, 1, 256)
        assert driver()[-1] == "cuCtxPopCurrent_v2"


@needs_compiler
def test_a_call_in_host_memory_leaves_the_driver_alone(driver):
    for found in (backends._unavailable, backends._first):
        found.cache_clear()
    dice_core.loss(np.zeros((1, 2, 3), np.float32), np.zeros((1, 3), np.uint8))
    assert driver() == []


@needs_compiler
def test_a_kernel_is_of_its_device_and_follows_the_streams_of_what_it_reads(driver, monkeypatch):
    made = []
    monkeypatch.setattr(_gpu_cache, "cubin", lambda *of: made.append(of) or b"\x7fELF")
    monkeypatch.setattr(_gpu, "_job", functools.lru_cache(_gpu._Job))

    def array(shape, dtype, stream, owner=None):
        host = np.zeros(shape, dtype)
        layout = buffers.Layout(shape, host.strides, dtype, host.itemsize, "cuda:1")
        return buffers.Buffer(4096, layout, owner, stream=stream)

    x, y = array((1, 2, 8), "float32", 5), array((1, 8), "uint8", 6)
    cotangent, scale = array((3, 1, 2), "float64", 5), array((), "float32", 7)
    at = spec.call(x, y, p=1, ignore_label=None)
    _gpu.gradient(at.logits, at.labels, cotangent, x, at.spec, 1, scale)
    calls = driver()
    assert [line for line in calls if "Event" in line and "stroy" not in line] == [
        *("cuEventCreate 2", "cuEventRecord 6", "cuStreamWaitEvent 5"),
        *("cuEventCreate 2", "cuEventRecord 7", "cuStreamWaitEvent 5"),
    ]
    assert "context 1041 stream 5:" in calls[-2]
    assert [capability for _, _, capability in made] == [(12, 0)]


class TestUnavailable:
    def test_without_a_driver(self, monkeypatch):
        monkeypatch.setattr(_gpu_driver, "LIBRARY", "libnothing.so.1")
        forget()
        assert "there is no NVIDIA driver (libnothing.so.1 does not load)" in _gpu.unavailable()[0]
        forget()

    @needs_compiler
    def test_without_a_device(self, driver, monkeypatch):
        monkeypatch.setenv("STUB_DEVICES", "-1")
        assert "CUDA_ERROR_NO_DEVICE: no CUDA-capable device" in _gpu.unavailable()[0]
        monkeypatch.setenv("STUB_DEVICES", "0")
        assert "sees no GPU" in _gpu.unavailable()[0]

    @needs_compiler
    def test_with_an_old_driver(self, driver, monkeypatch):
        monkeypatch.setitem(_gpu_driver._FUNCTIONS, "cuNotYet", ())
        assert "older than CUDA 12" in _gpu.unavailable()[0]

    @needs_compiler
    def test_without_numba_cuda(self, driver, monkeypatch):
        monkeypatch.setattr(_gpu_cache, "version", lambda package: None)
        (reason,) = _gpu.unavailable()
        assert "needs numba-cuda" in reason
        assert 'pip install "dice_core[gpu]"' in reason

    @needs_compiler
    def test_with_a_driver_older_than_the_compiler(self, driver, monkeypatch):
        monkeypatch.setenv("STUB_VERSION", "12080")
        monkeypatch.setattr(_gpu_cache, "version", lambda package: "13.5.37")
        (reason,) = _gpu.unavailable()
        assert "made for CUDA 12, the compiler (nvidia-nvjitlink 13.5.37) for a later" in reason
        assert "update the driver" in reason

    @needs_compiler
    def test_with_all(self, driver, monkeypatch):
        monkeypatch.setattr(_gpu_cache, "version", lambda package: "13.5.37")
        assert _gpu.unavailable() == []
        assert _gpu_driver.capability(0) == (9, 0)
        assert _gpu_driver.capability(1) == (12, 0)
        assert _gpu_driver.name(1) == "Stub 41"


def test_the_cache_knows_every_source():
    """Of what a kernel is made from: the modules and those of the package that they import."""
    folder, named = Path(_gpu.__file__).parent, set()
    waiting = {"_gpu_compile.py"}
    while waiting - named:
        named |= waiting
        for name in tuple(waiting):
            for line in (folder / name).read_text().splitlines():
                for module in re.findall(r"^from \.(\w+) import|^from \. import (\w+)", line):
                    waiting.add(f"{''.join(module)}.py")
    assert named - {"buffers.py"} == set(_gpu_cache.SOURCES)


class TestCache:
    @pytest.fixture
    def compiled(self, monkeypatch, tmp_path):
        """What was compiled, all of it fake."""
        made = []

        def compile(kind, plan, capability):
            made.append((kind, plan, capability))
            return f"code of {made[-1]}".encode()

        fake = type(sys)("dice_core._gpu_compile")
        fake.compile = compile
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr("dice_core._gpu_compile", fake, raising=False)
        monkeypatch.setenv(_gpu_cache.VARIABLE, str(tmp_path / "a" / "cache"))
        return made

    def files(self):
        return sorted(_gpu_cache.folder().glob("*"))

    def test_a_kernel_is_compiled_once(self, compiled):
        code = _gpu_cache.cubin("total", PLAN, (9, 0))
        assert _gpu_cache.cubin("total", PLAN, (9, 0)) == code
        assert len(compiled) == len(self.files()) == 1

    @pytest.mark.parametrize(
        "other",
        [("loss", PLAN, (9, 0)), ("total", Plan("float16", "uint8", 5), (9, 0)),
         ("total", replace(PLAN, spec=spec.Spec(gamma=0.0)), (9, 0)), ("total", PLAN, (8, 0))],
    )  # fmt: skip
    def test_another_is_another_file(self, compiled, other):
        code = _gpu_cache.cubin("total", PLAN, (9, 0))
        assert _gpu_cache.cubin(*other) != code
        assert len(self.files()) == 2

    @pytest.mark.parametrize("what", ["version", "SOURCES"])
    def test_other_versions_are_other_files(self, compiled, monkeypatch, what):
        _gpu_cache.cubin("total", PLAN, (9, 0))
        _gpu_cache._origin.cache_clear()
        value = (lambda package: "999") if what == "version" else ("_gpu_driver.py",)
        monkeypatch.setattr(_gpu_cache, what, value)
        _gpu_cache.cubin("total", PLAN, (9, 0))
        _gpu_cache._origin.cache_clear()
        assert len(compiled) == 2

    @pytest.mark.parametrize("damage", [b"", b"short", None])
    def test_a_damaged_file_is_replaced(self, compiled, damage):
        code = _gpu_cache.cubin("total", PLAN, (9, 0))
        (path,) = self.files()
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"?" if damage is None else damage)
        assert _gpu_cache.cubin("total", PLAN, (9, 0)) == code
        assert path.read_bytes() == whole
        assert len(compiled) == 2

    def test_a_folder_that_cannot_be_written_is_done_without(self, compiled, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv(_gpu_cache.VARIABLE, str(tmp_path / "file" / "cache"))
        assert _gpu_cache.cubin("total", PLAN, (9, 0))
        assert _gpu_cache.cubin("total", PLAN, (9, 0))
        assert len(compiled) == 2

    def test_a_user_without_a_home_does_without(self, compiled, monkeypatch):
        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv(_gpu_cache.VARIABLE)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(_gpu_cache.Path, "home", no_home)
        assert _gpu_cache.cubin("total", PLAN, (9, 0))

    def test_threads_that_write_at_once_leave_one_whole_file(self, compiled):
        codes = []
        together = threading.Barrier(8)

        def work():
            together.wait()
            codes.append(_gpu_cache.cubin("total", PLAN, (9, 0)))

        team = [threading.Thread(target=work) for _ in range(8)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        assert len(set(codes)) == 1
        assert [path.suffix for path in self.files()] == [".cubin"]

    def test_where_it_is(self, monkeypatch, tmp_path):
        monkeypatch.setenv(_gpu_cache.VARIABLE, str(tmp_path))
        assert _gpu_cache.folder() == tmp_path
        monkeypatch.delenv(_gpu_cache.VARIABLE)
        monkeypatch.setattr(_gpu_cache.os, "name", "posix")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert _gpu_cache.folder() == Path("/somewhere/dice_core")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert _gpu_cache.folder() == Path.home() / ".cache" / "dice_core"


SESSION = """
import json, sys
import numpy as np
from dice_core import _gpu, _gpu_driver, buffers
sys.path.insert(0, {tests!r})
_gpu_driver.LIBRARY = {library!r}
from gpu_simulator import DeviceArray
import dice_core

x = DeviceArray.holding(np.zeros((2, 4, 8, 16), np.float16))
y = DeviceArray.holding(np.zeros((2, 8, 16), np.uint8))
x.stream = 33
dice_core.precompile(x, y)
mark = len(open({log!r}).readlines())
value, grad = dice_core.loss_and_grad(x, y)
print(json.dumps({{
    "numba": "numba" in sys.modules,
    "torch": "torch" in sys.modules,
    "x": x.host.ctypes.data, "y": y.host.ctypes.data, "grad": grad.host.ctypes.data,
    "value": value.host.ctypes.data,
    "calls": open({log!r}).read().splitlines()[mark:],
}}))
"""


@needs_compiler
def test_a_warm_process_imports_no_numba_and_queues_three_launches(library, tmp_path):
    """The real kernels, compiled by a first process, in a second one."""
    pytest.importorskip("numba_cuda", reason="needs the extra gpu")
    log = tmp_path / "log"
    environment = os.environ | {
        "STUB_LOG": str(log),
        _gpu_cache.VARIABLE: str(tmp_path / "cache"),
        "DICE_CORE_CHECK": "0",
    }
    source = SESSION.format(tests=str(Path(__file__).parent), library=str(library), log=str(log))
    sessions = []
    for _ in range(2):
        log.write_text("")
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        sessions.append(json.loads(done.stdout))
    first, second = sessions
    assert first["numba"]
    assert not second["numba"]
    assert not second["torch"]
    launches = [line for line in second["calls"] if line.startswith("cuLaunchKernel")]
    assert launches == [f"cuLaunchKernel blocks {n} threads 256" for n in (2, 2, 2)]
    arguments = [line for line in second["calls"] if line.startswith("  kernel")]
    assert all("context 1040 stream 33:" in line for line in arguments)
    statistics, loss, gradient = (
        [int(number, 16) for number in line.split(":")[1].split()] for line in arguments
    )
    assert statistics[:2] == gradient[:2] == [second["x"], second["y"]]
    assert gradient[2] == second["grad"]
    assert loss[0] == statistics[2]
    assert loss[7] == second["value"]
    assert loss[8] == gradient[3]
    geometry = [2, 1, 2048, 128, 1024, 256, 2, 128, 0, 1, 1024, 256, 2]
    minus_one = 2**64 - 1
    assert statistics[6:] == [*geometry, 0, minus_one, 0]
    assert gradient[4:] == [0, 0, *geometry, 0, minus_one, 0]
    assert len(statistics) == 22
    assert loss[2:7] == [2, 1, 3, 4, 1]
    assert len(loss) == 24


@pytest.mark.parametrize("asked", [spec.Spec(), spec.Spec("sigmoid", dense=True)])
def test_a_launch_has_as_many_arguments_as_its_kernel(asked):
    compiled = pytest.importorskip("dice_core._gpu_compile", reason="needs the extra gpu")
    for kind in _gpu_kernels.KINDS:
        plan = replace(PLAN, spec=asked)
        kernel = _gpu_kernels.kernel(kind, plan, compiled.operations(plan))
        types = compiled.SIGNATURES[kind].args
        assert kernel.__code__.co_argcount == len(types)
        codes = "".join("d" if numba_type == compiled.float64 else "q" for numba_type in types)
        packed = _gpu_kernels.ARGUMENTS[kind]
        assert struct.Struct(codes).size == struct.calcsize(packed)
        assert struct.pack(packed, *range(len(types))) == struct.pack(codes, *range(len(types)))
