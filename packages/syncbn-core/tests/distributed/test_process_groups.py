"""The processes that a layer synchronizes with: all, a group, or this process alone."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn_core import THIS_PROCESS, SynchronizedBatchNorm1d

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batches(world):
    """The batch of each process, (P, N, C)."""
    return torch.randn(world.size, 3, 5, dtype=torch.float64)


def assert_normalized_as_one(layer, ours, together):
    whole = together.flatten(0, 1)
    expected = (ours - whole.mean(0)) / (whole.var(0, correction=0) + layer.eps).sqrt()
    torch.testing.assert_close(layer(ours), expected, **EXACT)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * whole.var(0), **EXACT)


def train_with_all(world):
    x = batches(world)
    assert_normalized_as_one(SynchronizedBatchNorm1d(5, dtype=torch.float64), x[world.rank], x)


def test_no_group_means_all_processes(processes):
    processes(4).run(train_with_all)


def pairs(world):
    """Make a group of processes 0 and 1 and one of 2 and 3; return this process's, and its ranks."""
    both = [(dist.new_group(ranks), ranks) for ranks in ([0, 1], [2, 3])]
    return both[world.rank // 2]


def train_in_pairs(world):
    group, ranks = pairs(world)
    x = batches(world)
    layer = SynchronizedBatchNorm1d(5, dtype=torch.float64, process_group=group)
    assert_normalized_as_one(layer, x[world.rank], x[ranks])

    ours = x[world.rank].clone().requires_grad_()
    whole = x[ranks].flatten(0, 1).requires_grad_()
    weights = torch.randn(6, 5, dtype=torch.float64)
    (layer(ours) * weights.view(2, 3, 5)[world.rank % 2]).sum().backward()
    (nn.BatchNorm1d(5, dtype=torch.float64)(whole) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, whole.grad.view(2, 3, 5)[world.rank % 2], **EXACT)


def test_pairs_of_processes_synchronize_among_themselves(processes):
    processes(4).run(train_in_pairs)


def train_alone(world):
    x = batches(world)[world.rank]
    layer = SynchronizedBatchNorm1d(5, dtype=torch.float64, process_group=THIS_PROCESS)
    with world.counted() as calls:
        assert_normalized_as_one(layer, x, x[None])
    assert not calls, calls


def test_this_process_synchronizes_with_no_other_process(processes):
    processes(2).run(train_alone)


def train_with_a_group_of_others(world):
    group = dist.new_group([0])
    layer = SynchronizedBatchNorm1d(5, process_group=group)
    try:
        layer(torch.randn(3, 5))
    except ValueError as error:
        return str(error)


def test_a_process_outside_the_group_gets_an_error(processes):
    inside, outside = processes(2).run(train_with_a_group_of_others)
    assert inside is None
    assert outside == (
        "expected a process_group that this process is in at 'SynchronizedBatchNorm1d', got one without "
        "process 1: give every process its own sub-group, or THIS_PROCESS"
    )


def copy_and_pickle(world):
    group, _ = pairs(world)
    model = nn.Sequential(SynchronizedBatchNorm1d(5, process_group=group))
    for layer in (model[0], copy.deepcopy(model)[0]):
        assert layer.process_group is group, layer
    for layer in (model[0], copy.deepcopy(model)[0]):
        with pytest.warns(UserWarning, match="process_group .* is not part of a pickle"):
            loaded = pickle.loads(pickle.dumps(layer))
        assert loaded.process_group is None
    alone = SynchronizedBatchNorm1d(5, process_group=THIS_PROCESS)
    assert pickle.loads(pickle.dumps(alone)).process_group is THIS_PROCESS


def test_copies_keep_the_group_and_pickles_drop_it(processes):
    processes(4).run(copy_and_pickle)


def train_two_copies(world):
    layer = SynchronizedBatchNorm1d(5, dtype=torch.float64)
    x = batches(world)
    layer(x[world.rank])  # so that a copy is made of a layer that has been used
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x[world.rank]), layer(x[world.rank]), rtol=0, atol=0)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_a_copy_synchronizes_too(processes):
    processes(2).run(train_two_copies)


@pytest.mark.parametrize("value", [None, THIS_PROCESS])
def test_without_an_initialized_torch_distributed_a_layer_is_torchs_own(value):
    layer, twin = SynchronizedBatchNorm1d(5, process_group=value), nn.BatchNorm1d(5)
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=0)
