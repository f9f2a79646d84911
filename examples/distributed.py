"""Batch Dice over two processes gives the training of a single one.

    torchrun --nproc-per-node 2 examples/distributed.py

Each process has its own volumes. `process_group="world"` adds the sums of all of them before the
Dice loss is computed, in one collective call per step, and DistributedDataParallel averages the
gradients. The first process then trains alone on all volumes, and the two loss curves are printed
side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dice_core.torch import DiceCELoss

VOLUMES, SIDE, STEPS = 4, 24, 20


def volumes() -> tuple[Tensor, Tensor]:
    """Noisy images (N, 1, *) of spheres of different sizes, and their labels (N, *)."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.linspace(-1, 1, SIDE)
    radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
    labels = torch.stack([(radius < 0.3 + 0.15 * k).long() for k in range(VOLUMES)])
    noise = 0.5 * torch.randn(labels.shape, generator=generator)
    return (labels + noise)[:, None], labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 2, 1))


def train(net: nn.Module, images: Tensor, labels: Tensor, criterion: nn.Module) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    curve = []
    for _ in range(STEPS):
        loss = criterion(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def main() -> None:
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    images, labels = volumes()
    criterion = DiceCELoss(pool="batch", smooth=1, process_group="world")
    net = DistributedDataParallel(network())
    curve = train(net, images[rank::size], labels[rank::size], criterion)
    if rank == 0:
        single = train(network(), images, labels, DiceCELoss(pool="batch", smooth=1))
        print(f"step  {size} processes  1 process")
        for step, losses in enumerate(zip(curve, single, strict=True)):
            print(f"{step:4d}  {losses[0]:11.6f}  {losses[1]:9.6f}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
