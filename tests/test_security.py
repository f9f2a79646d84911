"""What SECURITY.md promises: no code that others may have written is loaded, and nothing is opened,
sent, run or imported that a call does not need.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from compare import kernel_rows

from dice_core import backends
from dice_core.gpu import cache, toolkit
from dice_core.gpu.plan import Plan

PLAN = Plan("float16", "uint8", 4, voxels=8, word=8)
NM = shutil.which("nm")
needs_modes = pytest.mark.skipif(
    not hasattr(os, "geteuid"), reason="folders have no owner and mode here"
)

ROOT = Path(__file__).parents[1]


def test_the_promises_are_linked():
    assert "](SECURITY.md)" in (ROOT / "README.md").read_text()
    promised = (ROOT / "SECURITY.md").read_text()
    assert all(word in promised for word in (cache.VARIABLE, backends.VARIABLE, "0700", "0644"))


# ---- the cache of compiled kernels ---------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that a stand-in for the compiler compiled."""
    made = []

    def compile(*of):
        made.append(of)
        return b"code of " + repr(of).encode()

    module = type(sys)("dice_core.gpu.compile")
    module.compile = compile
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("dice_core.gpu.compile", module, raising=False)
    return made


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A folder for the cache, not made yet, without whatever was warned of before."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    cache._warn.cache_clear()
    yield tmp_path / "cache"
    cache._warn.cache_clear()


def kernel():
    return cache.cubin("total", PLAN, (9, 0))


def planted(folder):
    """A file of the kernel's name whose content is right but for one byte that an attacker chose,
    with the digest that fits.
    """
    kernel()
    (path,) = folder.iterdir()
    code = b"evil" + path.read_bytes()[cache.DIGEST_BYTES + 4 :]
    path.write_bytes(cache._digest(path.stem, code) + code)
    assert kernel() == code, "the attack needs a reader that trusts the file"
    return path, code


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@needs_modes
@pytest.mark.parametrize(
    ("mask", "mode"), [(0, 0o644), (0o002, 0o644), (0o022, 0o644), (0o027, 0o640), (0o077, 0o600)]
)
def test_nobody_else_may_write_to_the_cache(compiled, folder, mask, mode):
    """Who may read a file is for the umask to say; our folder lets nobody else in."""
    with umask(mask):
        kernel()
    (path,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == mode
    kernel()
    assert len(compiled) == 1


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)
def test_a_folder_that_root_filled_is_for_everyone(compiled, monkeypatch):
    """Another user reads it, and compiles only what is not there."""
    cache._warn.cache_clear()
    with tempfile.TemporaryDirectory() as folder, umask(0o022):
        os.chmod(folder, 0o755)
        monkeypatch.setenv(cache.VARIABLE, folder)
        code = kernel()
        os.seteuid(12345)
        try:
            assert kernel() == code
            with pytest.warns(RuntimeWarning, match="not kept on disk: .*Permission denied"):
                cache.cubin("loss", PLAN, (9, 0))
        finally:
            os.seteuid(0)
    cache._warn.cache_clear()
    assert len(compiled) == 2


@needs_modes
@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702, 0o1777], ids=oct)
def test_a_folder_that_others_may_write_to_is_not_used(compiled, folder, mode):
    path, code = planted(folder)
    before = path.read_bytes()
    folder.chmod(mode)
    with pytest.warns(RuntimeWarning) as caught:
        assert kernel() != code
    assert kernel() != code  # without another warning, which would be an error
    assert len(compiled) == 3
    assert path.read_bytes() == before
    (warning,) = caught
    assert str(warning.message) == (
        f"compiled CUDA kernels are not kept on disk: {folder} can be written to by others "
        f"(chmod go-w); set DICE_CORE_CACHE_DIR to a folder that only you can write to"
    )


@needs_modes
def test_a_folder_of_another_user_is_not_used(compiled, folder, monkeypatch):
    _, code = planted(folder)
    mine = os.geteuid()
    monkeypatch.setattr(cache.os, "geteuid", lambda: mine + 1)
    if mine:
        with pytest.warns(RuntimeWarning, match=rf"another user \(uid {mine}, not {mine + 1}\)"):
            assert kernel() != code
    else:  # root may write anywhere
        assert kernel() == code
        os.chown(folder, 1234, -1)
        with pytest.warns(RuntimeWarning, match=r"belongs to another user \(uid 1234, not 1\)"):
            assert kernel() != code


@needs_modes
@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602], ids=oct)
def test_a_file_that_others_may_write_to_is_replaced(compiled, folder, mode):
    path, code = planted(folder)
    path.chmod(mode)
    assert kernel() != code
    assert kernel() != code
    assert len(compiled) == 2
    assert stat.S_IMODE(path.stat().st_mode) & cache.OTHERS_WRITE == 0


@needs_modes
def test_a_file_of_another_user_is_replaced(compiled, folder, monkeypatch):
    path, code = planted(folder)
    real = os.fstat

    def of_another(handle):
        status = list(real(handle))
        status[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(status)

    with monkeypatch.context() as patched:
        patched.setattr(cache.os, "fstat", of_another)
        assert kernel() != code
    assert path.read_bytes()[cache.DIGEST_BYTES :] == kernel()
    assert len(compiled) == 2


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links_are_not_followed(compiled, folder, tmp_path):
    """Neither to read another file, nor to overwrite it, nor to another folder."""
    path, code = planted(folder)
    target = path.rename(tmp_path / "target")
    path.symlink_to(target)
    before = target.read_bytes()
    assert kernel() != code
    assert target.read_bytes() == before
    assert path.is_file()
    assert not path.is_symlink()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="is not a folder but a link"):
        kernel()
    assert len(compiled) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_does_not_block(compiled, folder):
    kernel()
    (path,) = folder.iterdir()
    path.unlink()
    os.mkfifo(path, 0o600)
    reader = threading.Thread(target=kernel, daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()
    assert path.is_file()
    assert len(compiled) == 2


def test_a_kernel_is_not_read_under_the_name_of_another(compiled, folder):
    kernel()
    (path,) = folder.iterdir()
    other = cache.cubin("loss", PLAN, (9, 0))
    (second,) = set(folder.iterdir()) - {path}
    second.write_bytes(path.read_bytes())
    assert cache.cubin("loss", PLAN, (9, 0)) == other
    assert len(compiled) == 3


@pytest.mark.skipif(os.name == "nt", reason="a read-only folder is writable on Windows")
def test_a_read_only_home_is_reported_once(compiled, monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")  # not even root can write there
    cache._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="not kept on disk: .*/proc/nothing"):
        code = kernel()
    assert kernel() == code  # without another warning, which would be an error
    assert len(compiled) == 2
    cache._warn.cache_clear()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))


@pytest.mark.skipif(os.name == "nt", reason="a read-only folder is writable on Windows")
def test_a_folder_that_cannot_be_written_to_is_read(compiled, folder, monkeypatch):
    """For example one that an administrator filled for everyone."""
    code = kernel()

    def read_only(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_write", read_only)
    assert kernel() == code
    with pytest.warns(RuntimeWarning, match="not kept on disk: .*Permission denied"):
        cache.cubin("loss", PLAN, (9, 0))
    assert len(compiled) == 2


@pytest.mark.parametrize("package", cache.COMPILERS)
def test_every_compiler_s_version_is_in_the_name(monkeypatch, package):
    monkeypatch.setattr(toolkit, "linker", lambda: (13, 5))
    monkeypatch.setattr(toolkit, "version", lambda name: "1")
    cache._origin.cache_clear()
    before = cache._key("total", PLAN, (9, 0))
    monkeypatch.setattr(toolkit, "version", lambda name: "2" if name == package else "1")
    cache._origin.cache_clear()
    assert cache._key("total", PLAN, (9, 0)) != before
    cache._origin.cache_clear()


# ---- what a session does to the machine ----------------------------------------------------------

SESSION = Path(__file__).parent / "audited.py"
LIBRARIES = {None, "libcuda.so.1", "nvcuda.dll"}  # the process itself, and NVIDIA's driver
MODULES = {"dice_core", "numpy", *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def saw(tmp_path_factory):
    """What a session with every public call did, in an empty home that is its working directory."""
    home, report = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("report") / "json"
    folders = ("HOME", "USERPROFILE", "LOCALAPPDATA", "TMPDIR", "TEMP", "TMP")
    environment = os.environ | dict.fromkeys(folders, str(home)) | {"PYTHONDONTWRITEBYTECODE": "1"}
    environment["XDG_CACHE_HOME"] = str(home / "cache")
    environment.pop(cache.VARIABLE, None)
    done = subprocess.run(
        [sys.executable, "-W", "error", SESSION, report],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = sorted(path for path in home.rglob("*") if path.is_file())
    return json.loads(report.read_text()) | {"out": done.stdout, "left": left, "home": home}


def test_the_session_ran_and_was_watched(saw):
    assert len(saw["calls"]) > 45
    assert {"hashlib", "argparse", "importlib"} <= set(saw["imports"])


def test_no_network_no_process_no_file(saw):
    assert [event for event in saw["changes"] if event[0] != "cache"] == []


def test_nothing_is_written_but_the_cache(saw):
    """Not even by compiled code, which audit hooks do not see."""
    folder = saw["home"] / "cache" / "dice_core"
    (file,) = saw["left"]
    assert (file.parent, file.suffix) == (folder, ".cubin")
    changed = [Path(event[2]) for event in saw["changes"] if event[0] == "cache"]
    assert changed
    assert all(path in (folder.parent, folder) or path.parent == folder for path in changed)


def test_nothing_is_printed_but_the_report(saw):
    assert saw["out"].startswith("dice_core ")
    assert saw["out"].count("backends, in the order tried") == 1
    assert saw["out"].splitlines()[-1].startswith("  cupy ")


def test_only_the_driver_is_opened(saw):
    assert set(saw["libraries"]) <= LIBRARIES


def test_only_numpy_is_imported_and_torch_for_its_tensors(saw):
    assert {"dice_core"} <= {name for name in saw["modules"] if "cython" not in name} <= MODULES
    assert set(saw["imports"]) <= MODULES | {"torch"}  # which help() imports
    assert not {"socket", "ssl", "http", "urllib", "subprocess"} & set(saw["imports"])


@pytest.mark.skipif(NM is None, reason="needs nm, of binutils")
@pytest.mark.parametrize("row", kernel_rows(), ids=lambda row: row.name)
def test_kernels_call_nothing_that_opens_sends_or_runs(row):
    """Python's audit hooks do not see what compiled code does."""
    command = [NM, "-D", "--undefined-only", row.load().__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}
    assert "PyImport_ImportModule" in symbols or len(symbols) > 50
    found = re.compile(
        r"_*(fopen|open|openat|creat|socket|connect|bind|listen|accept|send\w*|recv\w*|p?write\w*|"
        r"getaddrinfo|gethostby\w+|system|popen|exec\w+|posix_spawnp?|v?fork|clone|dl(m?open|sym)|"
        r"unlink|rename|mkdir|remove|ptrace|mprotect|mmap|process_vm\w*|syscall)(64|2|_chk)*"
    )
    # After a fork they read /proc/PID/stat; they ask whether a thread that they started is gone.
    allowed = {"open", "open64", "syscall"}
    assert not [symbol for symbol in symbols - allowed if found.fullmatch(symbol)]
