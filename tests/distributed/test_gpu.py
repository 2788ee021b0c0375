"""Replicas on GPUs in each of several processes, which communicate over NCCL, are one batch all together."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpus import group_of_gpus
from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="torch is built without NCCL"),
]

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.BatchNorm1d(5, affine=False),
    ).to("cuda", torch.float64)


def train(world, sizes, wrapped):
    group = group_of_gpus(world.rank, world.size)
    device = torch.cuda.current_device()
    model, twin = convert_model(net(), process_group=group), net()
    called = DataParallelWithCallback(model, [device] * 2)
    if wrapped:
        called = DistributedDataParallel(called, process_group=group)
    for seed in range(3):
        torch.manual_seed(seed)
        whole = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64).cuda()
        weights = torch.randn(sum(sizes), 5, dtype=torch.float64).cuda()
        model.zero_grad()
        twin.zero_grad()
        (called(world.share(whole, sizes)) * world.share(weights, sizes)).sum().backward()
        (twin(whole) * weights).sum().backward()
        gradients = world.total_gradients(model)  # DDP's are means, of which the sum is the same
        torch.testing.assert_close(gradients, {name: p.grad for name, p in twin.named_parameters()}, **EXACT)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), **EXACT)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in DDP"])
@pytest.mark.parametrize("sizes", [[4, 4], [5, 2]], ids=str)
def test_replicas_of_processes_of_gpus_equal_the_whole_batch(sizes, wrapped, processes):
    processes(2).run(train, sizes, wrapped)
