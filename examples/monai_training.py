"""A training script of MONAI that runs itself twice, with MONAI's loss and with dice_core's."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet


def train(steps: int, side: int, classes: int) -> None:
    torch.manual_seed(0)
    net = UNet(3, 1, classes, channels=(8, 16, 32), strides=(2, 2))
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    image = torch.rand(1, 1, side, side, side)
    labels = (image * classes).long()
    begin = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_function(net(image), labels)
        loss.backward()
        optimizer.step()
    seconds = (time.perf_counter() - begin) / steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
    print(f"{seconds:8.2f} s a step, peak memory {peak:6.0f} MiB, last loss {loss.item():.4f}")


if len(sys.argv) > 1:
    train(*map(int, sys.argv[1:]))
else:
    theirs = "from monai.losses import DiceCELoss"
    for line in (theirs, theirs.replace("monai.losses", "dice_core.compat.monai")):
        print(f"{line:<50}", end="", flush=True)
        script = Path(__file__).read_text().replace(theirs, line, 1)
        command = [sys.executable, "-c", script, "5", "96", "32"]
        subprocess.run(command, check=True, cwd=Path(__file__).parent)  # the installed dice_core
