"""The calls of NVIDIA's driver, which a stub logs; the cache of compiled kernels."""

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
from dice_core import _gpu, allocators, backends, buffers, losses, spec
from dice_core.gpu import cache, driver, kernels, toolkit
from dice_core.gpu.plan import INTEGER, NUMBER, Arguments, Plan

STUB = Path(__file__).parent / "stub_driver.c"
PLAN = Plan("float16", "uint8", 4, voxels=8, word=8)
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler for the stub")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", path, STUB], check=True)
    return path


@pytest.fixture
def calls(library, monkeypatch, tmp_path):
    """Replaces the driver by the stub; calling it returns the calls logged since the last time."""
    log = tmp_path / "log"

    def logged():
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return lines

    monkeypatch.setenv("STUB_LOG", str(log))
    monkeypatch.setattr(driver, "LIBRARY", str(library))
    monkeypatch.setattr(toolkit, "_torch_cuda", lambda: None)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    forget()
    yield logged
    forget()


def forget():
    for found in (
        driver._driver,
        driver._context,
        driver._handle,
        driver.capability,
        driver.name,
        _gpu._kernel,
        cache._origin,
        toolkit.linker,
    ):
        found.cache_clear()


@needs_compiler
class TestLaunch:
    def test_grid_block_stream_and_arguments(self, calls):
        kernel = driver.load(b"\x7fELF and so on", "kernel")
        assert calls() == ["cuInit 0", "cuLibraryLoadData 464c457f", "cuLibraryGetKernel 1"]
        arguments = Arguments(a=INTEGER, b=INTEGER, c=NUMBER)
        packed = arguments.pack({"c": 0.5, "a": 2**63 - 1, "b": -1})
        kernel.launch(1, 77, 2**31 - 1, 256, packed)
        half = struct.unpack("<Q", struct.pack("<d", 0.5))[0]
        assert calls() == [
            "cuDevicePrimaryCtxRetain 41",
            "cuCtxPushCurrent_v2 1041",
            f"cuLaunchKernel blocks {2**31 - 1} threads 256",
            f"  kernel 8 context 1041 stream 77: {2**63 - 1:x} {2**64 - 1:x} {half:x}",
            "cuCtxPopCurrent_v2",
        ]

    def test_a_kernel_is_loaded_in_its_context(self, calls):
        kernel = driver.load(b"\x7fELF", "kernel")
        calls()
        kernel.load_on(1)
        assert calls()[1:] == [
            "cuCtxPushCurrent_v2 1041",
            "cuKernelGetFunction 8",
            "cuCtxPopCurrent_v2",
        ]

    def test_the_context_is_left_as_it_was(self, calls):
        kernel = driver.load(b"\x7fELF", "kernel")
        with driver._Current(0):  # as in a process that uses torch
            calls()
            kernel.launch(0, 0, 1, 256, b"")
            assert [line.split()[0] for line in calls()] == ["cuLaunchKernel", "kernel"]
            kernel.launch(1, 0, 1, 256, b"")
            assert "cuCtxPushCurrent_v2 1041" in calls()
            kernel.launch(0, 0, 1, 256, b"")
            assert "context 1040" in calls()[1]

    def test_another_stream_is_waited_for(self, calls):
        driver.wait(0, 5, 5)
        driver.wait(0, 0, 1)
        assert calls() == []
        driver.wait(0, 5, 6)
        waited = [line for line in calls() if "Event" in line]
        assert waited == [
            "cuEventCreate 2",
            "cuEventRecord 6",
            "cuStreamWaitEvent 5",
            "cuEventDestroy_v2",
        ]

    def test_an_error_has_its_name_and_the_context_is_put_back(self, calls, monkeypatch):
        kernel = driver.load(b"\x7fELF", "kernel")
        monkeypatch.setenv("STUB_FAILS", "cuLaunchKernel")
        with pytest.raises(
            driver.DriverError,
            match=r"cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS: .* \(CUDA error 700\)",
        ):
            kernel.launch(0, 0, 1, 256, b"")
        assert calls()[-1] == "cuCtxPopCurrent_v2"


@needs_compiler
def test_a_call_in_host_memory_leaves_the_driver_alone(calls):
    for found in (backends._unavailable, backends._first):
        found.cache_clear()
    x, y = np.zeros((1, 2, 3), np.float32), np.zeros((1, 3), np.uint8)
    dice_core.loss(x, y)
    assert calls() == []


@needs_compiler
def test_a_kernel_is_of_its_device_and_follows_the_streams_of_what_it_reads(calls, monkeypatch):
    made = []
    monkeypatch.setattr(cache, "cubin", lambda *of: made.append(of) or b"\x7fELF")
    monkeypatch.setattr(_gpu, "_job", functools.lru_cache(_gpu._Job))

    def array(shape, dtype, stream, owner=None):
        host = np.zeros(shape, dtype)
        layout = buffers.Layout(shape, host.strides, dtype, host.itemsize, "cuda:1")
        return buffers.Buffer(4096, layout, owner, stream=stream)

    def waited_for(lines):
        assert lines.count("cuStreamWaitEvent 5") == sum("cuEventRecord" in line for line in lines)
        return [int(line.split()[1]) for line in lines if line.startswith("cuEventRecord")]

    x, y = array((1, 2, 8), "float32", 5), array((1, 8), "uint8", 6)
    grad, scale = array((1, 2, 8), "float32", 7), array((), "float32", 9)
    _gpu.gradient(x, y, array((3, 1, 2), "float64", 8), grad, spec.Spec(), 1, scale)
    lines = calls()
    assert waited_for(lines) == [6, 7, 8, 9]
    assert "context 1041 stream 5:" in lines[-2]
    assert [capability for _, _, capability in made] == [(12, 0)]

    cotangent = array((3, 1, 2), "float64", 5)
    _gpu.gradient(x, array((1, 8), "uint8", 5), cotangent, x, spec.Spec(), 1)
    assert waited_for(calls()) == []

    monkeypatch.setattr(allocators, "empty", lambda near, shape, dtype: array(shape, dtype, 5))
    monkeypatch.setattr(buffers, "of", lambda buffer, name: buffer)
    monkeypatch.setattr(allocators, "is_ordered", lambda buffer: True)
    value, ratio = array((), "float32", 5), losses.Dice().ratio(1, 2)
    _gpu.loss(x, y, value, cotangent, spec.Spec(), ratio, array((2,), "float64", 8), 1)
    assert waited_for(calls()) == [6, 8]


class TestUnavailable:
    def test_without_a_driver(self, monkeypatch):
        monkeypatch.setattr(driver, "LIBRARY", "libnothing.so.1")
        forget()
        assert "no NVIDIA driver was found (cannot load libnothing.so.1)" in _gpu.unavailable()[0]
        forget()

    @needs_compiler
    def test_without_a_device(self, calls, monkeypatch):
        monkeypatch.setenv("STUB_DEVICES", "-1")
        assert "CUDA_ERROR_NO_DEVICE: no CUDA-capable device" in _gpu.unavailable()[0]
        monkeypatch.setenv("STUB_DEVICES", "0")
        assert "sees no GPU" in _gpu.unavailable()[0]

    @needs_compiler
    def test_with_an_old_driver(self, calls, monkeypatch):
        monkeypatch.setitem(driver._FUNCTIONS, "cuNotYet", ())
        assert "older than CUDA 12" in _gpu.unavailable()[0]

    @needs_compiler
    @pytest.mark.parametrize(("version", "extra"), [(12020, "gpu-cu12"), (13000, "gpu-cu13")])
    def test_without_numba_cuda(self, calls, monkeypatch, version, extra):
        monkeypatch.setenv("STUB_VERSION", str(version))
        monkeypatch.setattr(toolkit, "version", lambda package: None)
        (reason,) = _gpu.unavailable()
        assert reason == (
            f"needs numba-cuda, which replaces numba's built-in CUDA target: "
            f'pip install "dice_core[{extra}]"'
        )

    @needs_compiler
    def test_without_a_linker(self, calls, monkeypatch):
        installed(monkeypatch)
        monkeypatch.setattr(toolkit, "_loaded", lambda: None)
        (reason,) = _gpu.unavailable()
        assert reason == ('finds no nvJitLink of a CUDA toolkit: pip install "dice_core[gpu-cu13]"')

    @needs_compiler
    @pytest.mark.parametrize("version", [12020, 12080])
    def test_with_a_driver_older_than_the_compiler(self, calls, monkeypatch, version):
        monkeypatch.setenv("STUB_VERSION", str(version))
        installed(monkeypatch, **{"nvidia-nvjitlink": "13.5.37"})
        (reason,) = _gpu.unavailable()
        assert reason == (
            "the NVIDIA driver supports CUDA 12, the compiler (nvJitLink 13.5) needs one for "
            f"CUDA 13; update the driver, or {toolkit.replace(12)}"
        )

    @needs_compiler
    @pytest.mark.parametrize(
        ("version", "linker"),
        [(12020, "-cu12"), (12080, "-cu12"), (13000, "-cu12"), (13000, ""), (14000, "")],
    )
    def test_with_all(self, calls, monkeypatch, version, linker):
        monkeypatch.setenv("STUB_VERSION", str(version))
        installed(monkeypatch, **{f"nvidia-nvjitlink{linker}": "12.9.86" if linker else "13.5.37"})
        assert _gpu.unavailable() == []
        assert driver.capability(0) == (9, 0)
        assert driver.capability(1) == (12, 0)
        assert driver.name(1) == "Stub 41"


def installed(monkeypatch, **packages):
    """Claims that pip installed numba-cuda and these."""
    packages |= {"numba-cuda": "0.30.4", "cuda-bindings": "13.5.0"}
    monkeypatch.setattr(toolkit, "version", packages.get)


def header(abi):
    """The first bytes of a cubin of this ABI."""
    return b"\x7fELF\2\1\1" + bytes([abi, 7]) + bytes(40)


@needs_compiler
@pytest.mark.parametrize(
    ("cuda", "abi", "capability", "accepted"),
    [
        (12080, 0x33, (9, 0), True),
        (12080, 0x41, (9, 0), False),
        (12080, 0x41, (10, 0), True),
        (12080, 0x41, (12, 0), True),
        (13000, 0x33, (9, 0), True),
        (13000, 0x41, (9, 0), True),
        (12020, None, (9, 0), True),
    ],
)
def test_the_driver_accepts(calls, monkeypatch, cuda, abi, capability, accepted):
    monkeypatch.setenv("STUB_VERSION", str(cuda))
    assert driver.accepts(b"code" if abi is None else header(abi), capability) is accepted


@needs_compiler
@pytest.mark.parametrize("cuda", [12020, 12080, 13000])
def test_the_installed_linker_is_refused_by_drivers_that_cannot_load_its_code(
    calls, monkeypatch, cuda
):
    """The check before a call agrees with what the linker really makes."""
    pytest.importorskip("numba_cuda", reason="needs the extra gpu-cu12 or gpu-cu13")
    from dice_core.gpu import compile as compiler

    monkeypatch.setenv("STUB_VERSION", str(cuda))
    code = compiler.compile("total", Plan("float32", "uint8", 1), (9, 0))
    assert code[:4] == b"\x7fELF"
    assert driver.accepts(code, (9, 0)) == (not _gpu.unavailable())
    newest = compiler.compile("total", Plan("float32", "uint8", 1), (12, 0))
    assert driver.accepts(newest, (12, 0))
    assert toolkit.linker() == toolkit._loaded()


def test_the_cache_knows_every_source():
    """Everything that `gpu.compile` imports from the package, except argument checks."""
    folder, found = Path(cache.__file__).parent, set()
    waiting = {"compile.py"}
    while waiting - found:
        found |= waiting
        for name in tuple(waiting - {"../spec.py"}):
            for line in (folder / name).read_text().splitlines():
                if imported := re.match(r"from \. import ([\w, ]+)", line):
                    names = re.sub(r" as \w+", "", imported[1]).split(", ")
                    waiting |= {f"{each}.py" for each in names}
                elif imported := re.match(r"from (\.\.?)(\w+) import", line):
                    waiting.add(f"{'../' if imported[1] == '..' else ''}{imported[2]}.py")
    assert found == set(cache.SOURCES)


class TestCache:
    @pytest.fixture
    def compiled(self, monkeypatch, tmp_path):
        """A list of the kernels that a fake compiler compiled."""
        made = []

        def compile(kind, plan, capability):
            made.append((kind, plan, capability))
            return f"code of {made[-1]}".encode()

        fake = type(sys)("dice_core.gpu.compile")
        fake.compile = compile
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr("dice_core.gpu.compile", fake, raising=False)
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "a" / "cache"))
        cache._warn.cache_clear()
        return made

    def files(self):
        return sorted(cache.folder().glob("*"))

    def test_a_kernel_is_compiled_once(self, compiled):
        code = cache.cubin("total", PLAN, (9, 0))
        assert cache.cubin("total", PLAN, (9, 0)) == code
        assert len(compiled) == len(self.files()) == 1

    @pytest.mark.parametrize(
        "other",
        [("loss", PLAN, (9, 0)), ("total", Plan("float16", "uint8", 5), (9, 0)),
         ("total", replace(PLAN, spec=spec.Spec(gamma=0.0)), (9, 0)), ("total", PLAN, (8, 0))],
    )  # fmt: skip
    def test_another_is_another_file(self, compiled, other):
        code = cache.cubin("total", PLAN, (9, 0))
        assert cache.cubin(*other) != code
        assert len(self.files()) == 2

    @pytest.mark.parametrize("what", ["linker", "SOURCES"])
    def test_other_versions_are_other_files(self, compiled, monkeypatch, what):
        cache.cubin("total", PLAN, (9, 0))
        cache._origin.cache_clear()
        if what == "linker":
            monkeypatch.setattr(toolkit, "linker", lambda: (99, 9))
        else:
            monkeypatch.setattr(cache, "SOURCES", ("driver.py",))
        cache.cubin("total", PLAN, (9, 0))
        cache._origin.cache_clear()
        assert len(compiled) == 2

    @pytest.mark.parametrize("damage", [b"", b"short", None])
    def test_a_damaged_file_is_replaced(self, compiled, damage):
        code = cache.cubin("total", PLAN, (9, 0))
        (path,) = self.files()
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"?" if damage is None else damage)
        assert cache.cubin("total", PLAN, (9, 0)) == code
        assert path.read_bytes() == whole
        assert len(compiled) == 2

    @needs_compiler
    def test_a_file_of_an_abi_that_the_driver_lacks_is_replaced(self, compiled, calls, monkeypatch):
        """As another toolkit leaves it, of which neither pip nor its linker gives the version."""
        code = cache.cubin("total", PLAN, (9, 0))
        (path,) = self.files()
        key, stale = path.stem, header(0x41)
        path.write_bytes(cache._digest(key, stale) + stale)
        monkeypatch.setenv("STUB_VERSION", "13000")
        assert cache.cubin("total", PLAN, (9, 0)) == stale
        monkeypatch.setenv("STUB_VERSION", "12080")
        assert cache.cubin("total", PLAN, (9, 0)) == code
        assert cache.cubin("total", PLAN, (9, 0)) == code
        assert len(compiled) == 2
        assert len(self.files()) == 1

    def test_without_a_writable_folder_every_process_compiles(
        self, compiled, monkeypatch, tmp_path
    ):
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
        with pytest.warns(RuntimeWarning, match="not kept on disk: .*Not a directory"):
            cache.cubin("total", PLAN, (9, 0))
        cache.cubin("total", PLAN, (9, 0))  # without another warning, which would be an error
        assert len(compiled) == 2

    def test_a_user_without_a_home_has_no_cache(self, compiled, monkeypatch):
        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv(cache.VARIABLE)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(cache.Path, "home", no_home)
        with pytest.warns(RuntimeWarning, match="not kept on disk: Could not determine home"):
            assert cache.cubin("total", PLAN, (9, 0))

    def test_threads_that_write_at_once_leave_one_whole_file(self, compiled):
        codes = []
        together = threading.Barrier(8)

        def work():
            together.wait()
            codes.append(cache.cubin("total", PLAN, (9, 0)))

        team = [threading.Thread(target=work) for _ in range(8)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        assert len(set(codes)) == 1
        assert [path.suffix for path in self.files()] == [".cubin"]

    def test_where_it_is(self, monkeypatch, tmp_path):
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
        assert cache.folder() == tmp_path
        monkeypatch.delenv(cache.VARIABLE)
        monkeypatch.setattr(cache.os, "name", "posix")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert cache.folder() == Path("/somewhere/dice_core")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache.folder() == Path.home() / ".cache" / "dice_core"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache.folder() == Path.home() / ".cache" / "dice_core"


SESSION = """
import json, sys
import numpy as np
from dice_core.gpu import driver
sys.path.insert(0, {tests!r})
driver.LIBRARY = {library!r}
from emulated.arrays import DeviceArray
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
        cache.VARIABLE: str(tmp_path / "cache"),
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
        dict(zip(kernels.ARGUMENTS[kind].kinds, line.split(":")[1].split(), strict=True))
        for kind, line in zip(("statistics", "loss", "gradient"), arguments, strict=True)
    )
    for each in (statistics, loss, gradient):
        each.update({name: int(number, 16) for name, number in each.items()})
    for each in (statistics, gradient):
        assert (each["x"], each["y"]) == (second["x"], second["y"])
        assert [each[name] for name in ("samples", "runs", "run", "voxels")] == [2, 1, 256, 128]
        assert [each[f"x_{axis}"] for axis in "ncv"] == [1024, 256, 2]
        assert [each[f"y_{axis}"] for axis in "ncv"] == [128, 0, 1]
        assert [each[f"out_{axis}"] for axis in "ncv"] == [1024, 256, 2]
        assert (each["ignored"], each["excused"], each["scaled"]) == (2**64 - 1, 0, 0)
    assert gradient["out"] == second["grad"]
    assert gradient["cotangent"] == loss["derivative"]
    assert loss["partials"] == statistics["out"]
    assert loss["value"] == second["value"]
    sizes = ("samples", "runs", "fields", "classes", "groups")
    assert [loss[name] for name in sizes] == [2, 1, 3, 4, 1]


def test_arguments_are_packed_by_name():
    arguments = Arguments(a=INTEGER, b=NUMBER)
    assert arguments.pack({"b": 0.5, "a": 3}) == struct.pack("qd", 3, 0.5)
    for values in ({"a": 3}, {"a": 3, "b": 0.5, "c": 1}, {"a": 3, "c": 1}):
        with pytest.raises(TypeError, match=r"missing or unknown arguments: (b|c|b, c)$"):
            arguments.pack(values)
