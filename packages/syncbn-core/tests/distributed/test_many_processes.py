"""Many processes send sums in the forward instead of a gather; the results are those of the whole batch.

"Many" is a constant, which these tests set to 2.
"""

import copy
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn_core import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d
from syncbn_core._processes import collectives

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def two_are_many():
    return mock.patch.object(collectives, "MANY", 2)


def train(world, sizes, options, intercepted, layout):
    layer = SynchronizedBatchNorm2d(4, eps=0.3, dtype=torch.float64, **options)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    twin = nn.BatchNorm2d(
        4, 0.3, layer.momentum, layer.affine, layer.track_running_stats, dtype=torch.float64
    )
    twin.load_state_dict(layer.state_dict())
    with two_are_many():
        for _ in range(2):
            whole = torch.randn(sum(sizes), 4, 3, 5, dtype=torch.float64) * 3 + 1
            whole = whole.to(memory_format=getattr(torch, layout))
            is_intercepted = world.rank in intercepted
            world.assert_equals_whole_batch(layer, twin, whole, sizes, is_intercepted, **EXACT)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"fused": False}],
    ids=str,
)
@pytest.mark.parametrize("intercepted", [[], [0, 1, 2], [1]], ids=["one node", "three nodes", "both"])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("sizes", [[2, 3], [0, 4], [1, 1], [3, 1, 2], [2, 0, 5]], ids=str)
def test_every_step_is_that_of_the_whole_batch(sizes, layout, intercepted, options, processes):
    processes(len(sizes)).run(train, sizes, options, intercepted, layout)


def collectives_of_a_step(world):
    layer = SynchronizedBatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with two_are_many():
        with world.counted() as forward:
            y = layer(x)
        with world.counted() as backward:
            (y * torch.randn_like(y)).sum().backward()
    return dict(forward), dict(backward)


def test_a_step_has_one_all_reduce_each_way(processes):
    assert processes(3).run(collectives_of_a_step) == [({"all_reduce": 1}, {"all_reduce": 1})] * 3


def track_far_from_zero(world, mean):
    whole = torch.randn(64, 4, 6, 6, dtype=torch.float64) + mean
    layer = SynchronizedBatchNorm2d(4, momentum=1.0, dtype=torch.float64)
    with two_are_many():
        layer(world.share(whole))
    return (layer.running_var / (whole - mean).var((0, 2, 3)) - 1).abs().max().item()


@pytest.mark.parametrize(("mean", "error"), [(0.0, 1e-12), (1e2, 1e-10), (1e4, 1e-6), (1e6, 1e-2)])
def test_a_mean_far_from_zero_costs_the_square_of_its_ratio_to_the_deviation(mean, error, processes):
    assert max(processes(2).run(track_far_from_zero, mean)) <= error


def train_on_a_single_value(world):
    layer = SynchronizedBatchNorm1d(2)
    with two_are_many():
        try:
            layer(torch.randn(int(world.rank == 1), 2))
        except ValueError as error:
            assert layer.num_batches_tracked == 0
            return str(error)


def test_one_value_per_channel_is_an_error_in_every_process(processes):
    for error in processes(2).run(train_on_a_single_value):
        assert "Expected more than 1 value per channel when training" in error


def train_on_nothing(world):
    layer = SynchronizedBatchNorm2d(3)
    x = torch.randn(0, 3, 2, 2, requires_grad=True)
    with two_are_many():
        layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert layer.num_batches_tracked == 0
    torch.testing.assert_close(layer.running_var, torch.ones(3), rtol=0, atol=0)


def test_empty_batches_in_all_processes_update_no_running_statistics(processes):
    processes(2).run(train_on_nothing)


def train_in_ddp(world, sizes):
    twin = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    model = copy.deepcopy(twin)
    for index in (0, 2):
        model[index].__class__ = SynchronizedBatchNorm1d
    model = DistributedDataParallel(model)
    x = torch.randn(sum(sizes), 4, dtype=torch.float64)
    weights = torch.randn(sum(sizes), 3, dtype=torch.float64)
    with ExitStack() as stack:
        if world.size < collectives.MANY:
            stack.enter_context(two_are_many())
        ours = world.share(x, sizes).clone().requires_grad_()
        (model(ours) * world.share(weights, sizes)).sum().backward()
    whole = x.clone().requires_grad_()
    (twin(whole) * weights).sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad * world.size, theirs.grad, **EXACT)
    torch.testing.assert_close(ours.grad, world.share(whole.grad, sizes), **EXACT)


@pytest.mark.parametrize("sizes", [[0, 5], [2, 3], [1, 0, 3]], ids=str)
def test_ddp_with_an_empty_batch_has_the_gradients_of_the_whole_batch(sizes, processes):
    processes(len(sizes)).run(train_in_ddp, sizes)


@pytest.mark.full
def test_nine_processes_one_with_an_empty_batch(new_processes):
    new_processes(9).run(train_in_ddp, [0, *[2] * 8])
