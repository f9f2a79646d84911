"""A training script of MONAI, as it is and with one import line changed to dice_core's.

Run without arguments it runs itself both ways and prints what each took:

    python examples/monai_training.py
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

CLASSES, SIDE, STEPS = 32, 96, 5


def train() -> None:
    torch.manual_seed(0)
    net = UNet(3, 1, CLASSES, channels=(8, 16, 32), strides=(2, 2))
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    image = torch.rand(1, 1, SIDE, SIDE, SIDE)
    labels = (image * CLASSES).long()
    begin = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_function(net(image), labels)
        loss.backward()
        optimizer.step()
    seconds = (time.perf_counter() - begin) / STEPS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
    print(f"{seconds:8.2f} s a step, peak memory {peak:6.0f} MiB, last loss {loss.item():.4f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train()
    else:
        script = Path(__file__).read_text()
        for library in ("monai.losses", "dice_core.compat.monai"):
            line = f"from {library} import DiceCELoss"
            print(f"{line:<50}", end="", flush=True)
            changed = script.replace("from monai.losses import DiceCELoss", line, 1)
            subprocess.run([sys.executable, "-c", changed, "train"], check=True)
