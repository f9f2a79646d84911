"""Trains a 3-D U-Net with the ordinary loss of its logits, and with LinearLoss of its features.

Prints the losses, which agree, and the time and peak memory of a step; also those of a step without
a loss, whose gradient is that of the mean of the logits. Each runs in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from dice_core.torch import DiceCELoss, LinearHead, LinearLoss

WAYS = ("ordinary", "fused", "no loss")


def nnunet(classes: int, fused: bool) -> torch.nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    net = PlainConvUNet(
        input_channels=1,
        n_stages=4,
        features_per_stage=(16, 32, 64, 128),
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=(1, 2, 2, 2),
        n_conv_per_stage=2,
        num_classes=classes,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=torch.nn.LeakyReLU,
    )
    if fused:  # with deep supervision: every one of the seg_layers
        net.decoder.seg_layers[-1] = LinearHead(net.decoder.seg_layers[-1])
    return net


def monai(classes: int, fused: bool) -> torch.nn.Module:
    from monai.networks.nets import UNet

    body = UNet(3, 1, 16, channels=(16, 32, 64, 128), strides=(2, 2, 2))
    conv = torch.nn.Conv3d(16, classes, 1)
    return torch.nn.Sequential(body, LinearHead(conv) if fused else conv)


def train(way: str, network: str, side: int, classes: int, steps: int) -> dict[str, Any]:
    """The loss and seconds of each step, and how much memory they took, in MiB."""
    torch.manual_seed(0)
    net = {"nnunet": nnunet, "monai": monai}[network](classes, way == "fused")
    loss = DiceCELoss(smooth=1e-5)
    fused_loss = LinearLoss(loss)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.99, nesterov=True)
    torch.manual_seed(1)
    image = torch.rand(1, 1, side, side, side)
    labels = (image[:, 0] * classes).to(torch.uint8)
    before, losses, seconds = peak(), [], []
    for _ in range(steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        output = net(image)
        if way == "fused":
            value = fused_loss(*output, labels)
        else:
            value = loss(output, labels) if way == "ordinary" else output.mean()
        del output
        value.backward()
        optimizer.step()
        losses.append(value.item())
        seconds.append(time.perf_counter() - begin)
    used = peak() - before
    with torch.no_grad():  # a network that is used after training returns logits
        assert net.eval()(image[..., :16, :16, :16]).shape[1] == classes
    return {"losses": losses, "seconds": seconds, "memory": used}


def peak() -> float:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=("nnunet", "monai"), default="monai")
    parser.add_argument("--side", type=int, default=64, help="voxels along each axis")
    parser.add_argument("--classes", type=int, default=105)
    parser.add_argument("--steps", type=int, default=4, help="of training")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a process
    settings = parser.parse_args()
    if settings.way:
        print(json.dumps(train(**vars(settings))))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'':16}" + "".join(f"{way:>12}" for way in WAYS))
    for i in range(settings.steps):
        cells = (found[way]["losses"][i] for way in WAYS[:2])
        print(f"{f'loss of step {i}':16}" + "".join(f"{cell:12.6f}" for cell in cells))
    print(f"{'seconds a step':16}" + "".join(f"{min(found[w]['seconds']):12.2f}" for w in WAYS))
    print(f"{'peak MiB':16}" + "".join(f"{found[w]['memory']:12.0f}" for w in WAYS))


if __name__ == "__main__":
    main()
