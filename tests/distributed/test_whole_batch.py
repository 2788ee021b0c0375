"""Replicas in each of several processes are one batch, all together."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn_convert import convert_model
from syncbn_core import THIS_PROCESS
from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def net():
    """Build a net of (N, 3, 6, 6) to (N, 5) whose layers see a spread of sizes, the same one each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.BatchNorm1d(5, affine=False),
    ).double()


def replicated(replicas, **options):
    return DataParallelWithCallback(convert_model(net(), **options), ["cpu"] * replicas)


def train(world, replicas, sizes, fused):
    model, twin = replicated(replicas, fused=fused), net()
    for step in range(3):
        torch.manual_seed(step)
        whole = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64)
        world.assert_equals_whole_batch(model, twin, whole, sizes, **EXACT)


@pytest.mark.parametrize(
    ("replicas", "sizes"),
    [
        *((1, [6, 6]), (1, [3, 3, 3, 3]), (2, [6, 6]), (3, [6, 6])),  # 2 x 1, 4 x 1, 2 x 2, 2 x 3
        *((1, [1, 5]), (2, [5, 3]), (3, [7, 4]), (3, [9, 2]), (2, [1, 4])),  # uneven, with fewer replicas
    ],
)
@pytest.mark.parametrize(
    "fused", [True, pytest.param(False, marks=pytest.mark.full)], ids=["fused", "composite"]
)
def test_every_step_is_that_of_the_whole_batch(replicas, sizes, fused, processes):
    processes(len(sizes)).run(train, replicas, sizes, fused)


def test_a_step_of_plain_operations_is_that_of_the_whole_batch(processes):
    processes(2).run(train, 3, [7, 4], False)


def train_under_ddp(world, replicas, options):
    whole = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    weights = torch.randn(12, 5, dtype=torch.float64)
    model, twin = replicated(replicas), net()
    wrapped = DistributedDataParallel(model, **options)
    for _ in range(3):
        for module in (model, twin):
            module.zero_grad()
        (wrapped(world.share(whole)) * world.share(weights)).sum().backward()
        (twin(whole) * weights).sum().backward()
        gradients = {name: p.grad / world.size for name, p in twin.named_parameters()}  # DDP's are means
        ours = {name: p.grad for name, p in model.module.named_parameters()}
        torch.testing.assert_close(ours, gradients, **EXACT)
        torch.testing.assert_close(model.module.state_dict(), twin.state_dict(), **EXACT)


MANY_BUCKETS = {"bucket_cap_mb": 1e-4}


@pytest.mark.pairwise
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, MANY_BUCKETS], ids=str)
@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (2, 2), (2, 3), (4, 1)])
def test_ddp_around_replicas_has_the_gradients_of_the_whole_batch(world_size, replicas, options, processes):
    processes(world_size).run(train_under_ddp, replicas, options)


def convert_wrapped(world):
    try:
        convert_model(DistributedDataParallel(net()))
    except ValueError as error:
        return str(error)


def test_to_convert_what_ddp_has_wrapped_is_an_error_that_tells_the_order(processes):
    for error in processes(2).run(convert_wrapped):
        assert "convert first, then wrap: DistributedDataParallel(convert_model(model))" in error


def train_replicas_alone(world):
    model, twin = replicated(2, process_group=THIS_PROCESS), net()
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64) + world.rank
    with world.counted() as calls:
        torch.testing.assert_close(model(x), twin(x), **EXACT)
    assert not calls, calls


def test_this_process_means_its_replicas_alone(processes):
    processes(2).run(train_replicas_alone)
