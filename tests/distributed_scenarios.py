"""Scenarios of torch.distributed, each run on every rank of a gloo group; `test_distributed`.

python tests/distributed_scenarios.py SIZE [NAME ...]
"""

import copy
import os
import pickle
import re
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dice_core.torch
from dice_core import losses
from dice_core.torch import DiceCELoss, DiceLoss, DiceScore, LinearLoss, loss, statistics

LIMIT = timedelta(seconds=60)


def volumes(samples=5, classes=4, seed=0, dtype=torch.float64):
    """The same logits and labels on every rank; the labels -1 are ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, classes, 6, 7, generator=generator, dtype=dtype)
    return x, torch.randint(-1, classes, (samples, 6, 7), generator=generator)


def close(actual, expected, rtol=1e-12, atol=1e-15):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def raises(kind, text, function, *arguments, **options):
    with pytest.raises(kind, match=re.escape(text)):
        function(*arguments, **options)


def with_gradient(function, x, y):
    """The function's value and the gradient of its sum."""
    leaf = x.clone().requires_grad_()
    value = function(leaf * 1, y)
    value.sum().backward()
    return value.detach(), leaf.grad


def shares(total, rank, size, first=0):
    """This rank's part of `total` things; `first` are the first rank's."""
    ends = [first, *(first + (total - first) * k // (size - 1) for k in range(1, size))]
    return slice(0 if rank == 0 else ends[rank - 1], ends[rank])


POOLED = {
    "Dice": losses.Dice(smooth=1, pool="batch"),
    "Dice of classes": losses.Dice(pool="batch", reduction="classes"),
    "weights": losses.Dice(pool="batch", weight=[1, 2, 3, 4], ignore_channel=0),
    "GeneralizedDice": losses.GeneralizedDice(pool="all"),
    "MCC": losses.MCC(pool="batch"),
    "Dice + CE": losses.Dice(pool="batch") + losses.CrossEntropy(pool="batch", weight=[1, 2, 3, 4]),
    "Focal": losses.Focal(pool="batch"),
}
SPLIT = {
    **POOLED,
    "Dice of samples": losses.Dice(smooth=1, reduction="none"),
    "mean": losses.Dice(smooth=1) + losses.CrossEntropy(),
    "sum": losses.Tversky(reduction="sum"),
    "p": losses.Dice(p=2, reduction="classes"),
}


def batches_of_any_size(rank, size):
    """Even none, or without a single label or valid voxel, on a rank."""
    x, y = volumes()
    for first in (0, 1, 2):
        mine = shares(len(x), rank, size, first)
        for term in POOLED.values():
            value, grad = with_gradient(lambda x, y, t=term: loss(x, y, t), x, y)
            for options in ({}, {"inplace": True}):
                of_rank, part = with_gradient(
                    lambda x, y, t=term, o=options: loss(x, y, t, process_group="world", **o),
                    x[mine],
                    y[mine],
                )
                close(of_rank, value)
                close(part, size * grad[mine])
    y[: len(y) // 2] = -1
    mine = shares(len(x), rank, size, len(y) // 2)  # the first rank has ignored voxels alone
    value, grad = with_gradient(DiceCELoss(pool="batch", smooth=1), x, y)
    module = DiceCELoss(pool="batch", smooth=1, process_group=distributed.group.WORLD)
    of_rank, part = with_gradient(module, x[mine], y[mine])
    close(of_rank, value)
    close(part, size * grad[mine])


def volumes_split_in_space(rank, size):
    x, y = volumes()
    mine = shares(x.shape[2], rank, size, 1)
    for term in SPLIT.values():
        value, grad = with_gradient(lambda x, y, t=term: loss(x, y, t), x, y)
        of_rank, part = with_gradient(
            lambda x, y, t=term: loss(x, y, t, process_group="world"), x[:, :, mine], y[:, mine]
        )
        close(of_rank, value)
        close(part, size * grad[:, :, mine])
        assert same_on_every_rank(of_rank, size)


def same_on_every_rank(tensor, size):
    everywhere = [torch.empty_like(tensor) for _ in range(size)]
    distributed.all_gather(everywhere, tensor)
    return all(torch.equal(tensor, each) for each in everywhere)


def half_precision(rank, size):
    x, y = volumes(dtype=torch.float32)
    x = x.half()
    mine = shares(len(x), rank, size, 1)
    value, grad = with_gradient(lambda x, y: loss(x, y, POOLED["Dice"]), x, y)
    of_rank, part = with_gradient(
        lambda x, y: loss(x, y, POOLED["Dice"], process_group="world") / size, x[mine], y[mine]
    )
    close(size * of_rank, value, rtol=1e-6)
    close(part.double(), grad[mine].double(), rtol=2e-3, atol=1e-7)


def learned_weights(rank, size):
    x, y = volumes()
    mine = shares(len(x), rank, size, 1)
    slopes = []
    for part, options in ((slice(None), {}), (mine, {"process_group": "world"})):
        weight = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64, requires_grad=True)
        loss(x[part], y[part], weight=weight, reduction="batch", **options).backward()
        slopes.append(weight.grad)
    close(slopes[1], slopes[0])  # each rank's own; the mean over ranks is the same


def subgroups(rank, size):
    groups = [distributed.new_group(ranks) for ranks in ([0, 1], list(range(size)))]
    x, y = volumes(samples=2)
    value = loss(x, y, POOLED["Dice"])
    if rank < 2:
        of_rank = loss(
            x[rank : rank + 1], y[rank : rank + 1], POOLED["Dice"], process_group=groups[0]
        )
        close(of_rank, value)
    else:
        raises(ValueError, "does not contain", loss, x, y, process_group=groups[0])
        raises(ValueError, "does not contain", DiceScore, process_group=groups[0])


def wrong_groups(rank, size):
    x, y = volumes()
    for wrong in ("all", 0, object()):
        raises(TypeError, "process_group must be", loss, x, y, process_group=wrong)
        raises(TypeError, "process_group must be", DiceLoss, process_group=wrong)
        raises(TypeError, "process_group must be", DiceScore, process_group=wrong)


def copies(rank, size):
    x, y = volumes()
    mine, value = shares(len(x), rank, size, 1), loss(x, y, POOLED["Dice"])
    module = DiceLoss(smooth=1, pool="batch", process_group="world")
    for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        close(each(x[mine], y[mine]), value)


class Network(nn.Module):
    """A small network, which computes its loss itself if it is given labels."""

    def __init__(self, criterion=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.double()
        self.criterion = criterion

    def forward(self, image, y=None):
        x = self.head(self.first(image).relu())
        return x if y is None else self.criterion(x, y)


def step(net, image, y, criterion=None):
    """Parameters after a step of gradient descent."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    value = net(image, y) if criterion is None else criterion(net(image), y)
    value.backward()
    optimizer.step()
    return value.detach()


def criterion_of(group=None):
    return DiceCELoss(pool="batch", smooth=1, process_group=group)


def images():
    _, y = volumes()
    return torch.randn(len(y), 1, 6, 7, generator=torch.Generator().manual_seed(3)).double(), y


def data_parallel(rank, size):
    """DistributedDataParallel's mean over ranks is exact, the loss being outside or inside."""
    image, y = images()
    mine = shares(len(y), rank, size, 1)
    single = Network()
    value = step(single, image, y, criterion_of())
    for inside in (False, True):
        net = DistributedDataParallel(Network(criterion_of("world") if inside else None))
        of_rank = step(net, image[mine], y[mine], None if inside else criterion_of("world"))
        close(of_rank, value)
        for a, b in zip(net.module.parameters(), single.parameters(), strict=True):
            close(a.detach(), b.detach(), rtol=1e-10)


def fully_sharded(rank, size):
    """FSDP2: so is its mean."""
    from torch.distributed.fsdp import fully_shard

    image, y = images()
    mine = shares(len(y), rank, size, 1)
    single = Network()
    value = step(single, image, y, criterion_of())
    net = Network()
    mesh = distributed.init_device_mesh("cpu", (size,))
    for layer in (net.first, net.head):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    of_rank = step(net, image[mine], y[mine], criterion_of("world"))
    close(of_rank, value)
    for a, b in zip(net.parameters(), single.parameters(), strict=True):
        close(a.full_tensor().detach(), b.detach(), rtol=1e-10)
    weight = net.head.weight
    head = LinearLoss(DiceLoss(smooth=1))
    features = torch.randn(1, 6, 3, 3).double()
    labels = torch.zeros(1, 3, 3, dtype=torch.uint8)
    raises(NotImplementedError, "full_tensor()", head, features, weight, None, labels)


def compiled(rank, size):
    x, y = volumes(samples=size)
    module = DiceLoss(smooth=1, pool="batch", process_group="world")
    mine = slice(rank, rank + 1)

    def function(x, y):
        return module(2 * x, y)

    value, grad = with_gradient(function, x[mine], y[mine])
    whole = torch.compile(function, backend="aot_eager", fullgraph=True)
    of_compiled, part = with_gradient(whole, x[mine], y[mine])
    close(of_compiled, value)
    close(part, grad)


def linear_head(rank, size):
    """The sums of a fused head are added like those of logits."""
    _, y = volumes()
    features = torch.randn(len(y), 6, 6, 7, generator=torch.Generator().manual_seed(4)).double()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(5)).double()
    mine = shares(len(y), rank, size, 1)
    expected = weight.clone().requires_grad_()
    value = LinearLoss(criterion_of())(features, expected, None, y)
    value.backward()
    part = weight.clone().requires_grad_()
    of_rank = LinearLoss(criterion_of("world"))(features[mine], part, None, y[mine])
    (of_rank / size).backward()
    close(of_rank, value)
    distributed.all_reduce(part.grad)
    close(part.grad, expected.grad, rtol=1e-10)


def scores(rank, size):
    x, y = volumes()
    for pool in ("batch", "none"):
        single = DiceScore(pool=pool)
        single.update(x, y)
        for first in (0, 2):  # the first rank has no batch at all, or one
            mine = shares(len(x), rank, size, first)
            score = DiceScore(pool=pool, process_group="world")
            if mine.stop > mine.start:
                local = score(x[mine], y[mine])
                alone = DiceScore(pool=pool)
                torch.testing.assert_close(local, alone(x[mine], y[mine]), equal_nan=True)
            for _ in range(2):  # what is accumulated stays local
                close(score.compute(), single.compute())
            restored = pickle.loads(pickle.dumps(score))
            close(restored.compute(), single.compute())
    score.reset()
    raises(RuntimeError, "before update", score.compute)
    score.update(x[:, : 4 - (rank == 0)], y.clamp(max=2))
    raises(ValueError, "different numbers of classes, 3 to 4", score.compute)


def sharded(rank, size):
    """DTensors: each rank's gradient is its shard of a single process's, with factor 1."""
    x, y = volumes()
    mesh = distributed.init_device_mesh("cpu", (size,))
    for axis, of_y in ((0, 0), (2, 1), (3, 2)):
        placed = distribute_tensor(y, mesh, [Shard(of_y)])
        for term in SPLIT.values():
            value, grad = with_gradient(lambda x, y, t=term: loss(x, y, t), x, y)
            leaf = distribute_tensor(x, mesh, [Shard(axis)]).requires_grad_()
            of_rank = loss(leaf, placed, term)
            assert type(of_rank) is torch.Tensor
            close(of_rank.detach(), value)
            of_rank.sum().backward()
            assert isinstance(leaf.grad, DTensor)
            assert leaf.grad.placements == leaf.placements
            close(leaf.grad.full_tensor(), grad)
        sums = statistics(distribute_tensor(x, mesh, [Shard(axis)]), placed)
        close(sums.array, statistics(x, y).array)
        score, alone = DiceScore(), DiceScore()
        score.update(distribute_tensor(x, mesh, [Shard(axis)]), placed)
        alone.update(x, y)
        close(score.compute(), alone.compute())
    with_axis = distribute_tensor(y[:, None], mesh, [Shard(2)])
    close(loss(distribute_tensor(x, mesh, [Shard(2)]), with_axis), loss(x, y))
    copies = distribute_tensor(x, mesh, [Replicate()])
    close(loss(copies, distribute_tensor(y, mesh, [Replicate()])), loss(x, y))


def wrongly_sharded(rank, size):
    x, y = volumes()
    mesh = distributed.init_device_mesh("cpu", (size,))
    placed = distribute_tensor(y, mesh, [Shard(0)])
    logits = distribute_tensor(x, mesh, [Shard(0)])
    channels = distribute_tensor(x, mesh, [Shard(1)])
    raises(ValueError, "only logits that are replicated, or sharded in", loss, channels, placed)
    raises(
        ValueError, "y must be sharded like x", loss, distribute_tensor(x, mesh, [Shard(2)]), placed
    )
    raises(TypeError, "y must be a DTensor like x", loss, logits, y)
    raises(TypeError, "x must be a DTensor like y", loss, x, placed)
    raises(ValueError, "x is a DTensor", loss, logits, placed, process_group="world")
    leaf = logits.requires_grad_()
    raises(NotImplementedError, "inplace=True", loss, leaf * 1, placed, inplace=True)


def mesh_of_two_axes(rank, size):
    """Samples over one axis of the mesh, space over the other."""
    if size % 2:
        return
    x, y = volumes()
    mesh = distributed.init_device_mesh("cpu", (size // 2, 2))
    leaf = distribute_tensor(x, mesh, [Shard(0), Shard(2)]).requires_grad_()
    term = POOLED["Dice + CE"]
    value, grad = with_gradient(lambda x, y: loss(x, y, term), x, y)
    of_rank = loss(leaf, distribute_tensor(y, mesh, [Shard(0), Shard(1)]), term)
    of_rank.backward()
    close(of_rank.detach(), value)
    close(leaf.grad.full_tensor(), grad)


SCENARIOS = [
    *(batches_of_any_size, volumes_split_in_space, half_precision, learned_weights, subgroups),
    *(wrong_groups, copies, data_parallel, fully_sharded, compiled, linear_head, scores, sharded),
    *(wrongly_sharded, mesh_of_two_axes),
]


def work(rank, size, store, names):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=LIMIT
    )
    for scenario in SCENARIOS:
        if not names or scenario.__name__ in names:
            scenario(rank, size)
            distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    size, names = int(sys.argv[1]), sys.argv[2:]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (size, str(Path(folder) / "store"), names), nprocs=size)
    print("passed:", dice_core.torch.__name__)
