"""Uses the whole public API on a CPU under an audit hook, and writes what it saw to a file.

`tests/test_security.py` runs this in a new process, and judges.
"""

# ruff: noqa: E402
import copy
import json
import os
import pickle
import pydoc
import runpy
import sys
from pathlib import Path
from types import ModuleType

REPORT = Path(sys.argv[1])
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (  # audit events: network, other processes, changes of the file system
    *("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "sqlite3."),
    *("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "pty."),
    *("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.kill", "shutil.", "tempfile."),
)
saw = {"calls": [], "changes": [], "libraries": [], "imports": [], "modules": []}
part = ""  # of the session; nothing is recorded between parts


def hook(event, arguments):
    if not part:
        return
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int):  # opened before
            return
        if (isinstance(flags, int) and flags & WRITES) or set(mode or "") & set("wax+"):
            saw["changes"].append([part, event, str(path)])
    elif event.startswith(CHANGES):
        saw["changes"].append([part, event, *map(str, arguments)])
    elif event == "ctypes.dlopen":
        saw["libraries"].append(arguments[0])
    elif event == "import" and f"{os.sep}dice_core{os.sep}" in importer():
        saw["imports"].append(arguments[0].partition(".")[0])


def importer():
    """The file that imports a module, past the import system itself."""
    frame = sys._getframe(2)
    while "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_filename


def called(result):
    saw["calls"].append(type(result).__name__)
    return result


def arrays():
    """Every public function on NumPy arrays."""
    import dice_core

    x = np.linspace(-3, 3, 2 * 3 * 64 * 64, dtype=np.float32).reshape(2, 3, 64, 64)
    y = (np.arange(2 * 64 * 64) % 3).astype(np.uint8).reshape(2, 64, 64)
    soft = np.abs(np.sin(x))
    for activation, target in (("softmax", y), ("softmax", soft), ("sigmoid", soft)):
        options = {"activation": activation, "num_threads": 2}
        called(dice_core.loss(x, target, **options))
        called(dice_core.loss_and_grad(x, target, out=np.empty_like(x), **options))
        sums = called(dice_core.statistics(x, target, **options))
        sums = called(pickle.loads(pickle.dumps(sums + sums)))
        called(dice_core.gradient(x, target, sums))
    called(dice_core.score(x, y))
    called(dice_core.precompile(x, y))
    for entry in dice_core.losses.TERMS:
        called(dice_core.loss_and_grad(x, y, entry.term()))
    for backend in ("reference", "cuda", "none such"):
        try:
            called(dice_core.loss(x, y, backend=backend))
        except (dice_core.BackendError, ValueError) as error:
            called(error)
    try:
        dice_core.loss(x, y + 1)
    except ValueError as error:
        called(error)


def report():
    """`python -m dice_core`."""
    sys.argv = ["dice_core"]
    runpy.run_module("dice_core", run_name="__main__")
    called(sys)


def tensors():
    """Training steps, a metric, and the other libraries' losses."""
    import dice_core
    from dice_core import torch as ours
    from dice_core.compat import monai, nnunet, smp

    network = torch.nn.Conv3d(1, 3, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    images, y = torch.ones(2, 1, 8, 8, 8), torch.ones(2, 1, 8, 8, 8, dtype=torch.uint8)
    criteria = [ours.DiceLoss(), ours.DiceCELoss(), ours.DiceFocalLoss()]
    criteria += [monai.DiceLoss(softmax=True, to_onehot_y=True), nnunet.DC_and_CE_loss({}, {})]
    criteria += [smp.DiceLoss("multiclass"), lambda x, y: ours.loss(x, y)]
    for criterion in criteria:
        optimizer.zero_grad()
        called(criterion(network(images), y)).backward()
        optimizer.step()
    for criterion in criteria[:-1]:
        called(copy.deepcopy(criterion).state_dict())
    logits = network(images)
    called(ours.DeepSupervision(ours.DiceLoss())([logits, logits], [y, y])).backward()
    metric = ours.DiceScore()
    metric.update(logits.detach(), y)
    called(metric.compute())
    called(ours.statistics(logits, y))
    called(pydoc.render_doc(dice_core))  # help(); it shows the part for torch too


def cache():
    """The cache of compiled kernels, with a stand-in for the compiler."""
    from dice_core.gpu import cache, plan

    compiler = ModuleType("dice_core.gpu.compile")
    compiler.compile = lambda *of: b"code"
    sys.modules[compiler.__name__] = sys.modules["dice_core.gpu"].compile = compiler
    for _ in range(2):
        called(cache.cubin("total", plan.Plan("float32", "uint8", 2), (9, 0)))


sys.addaudithook(hook)
import numpy as np

before = {name.partition(".")[0] for name in sys.modules}
part = "arrays"
arrays()
part = "report"
report()
part = ""
saw["modules"] = sorted({name.partition(".")[0] for name in sys.modules} - before)
import torch

torch.optim.SGD([torch.ones(1)], 0.1)  # imports more of torch
part = "tensors"
tensors()
part = "cache"
cache()
part = ""
REPORT.write_text(json.dumps(saw))
