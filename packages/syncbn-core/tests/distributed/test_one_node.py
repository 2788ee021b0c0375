"""Every process makes one autograd node for its replicas, and all processes are one batch."""

import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from syncbn_core import SynchronizedBatchNorm2d
from syncbn_core._autograd import joined_node, one_node
from syncbn_core._replicas.recomputation import may_be_intercepted

# The same as without processes; only pytest can import that file.
Replicas = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["Replicas"]

EXACT = {"rtol": 1e-12, "atol": 1e-12}
C = 4


def randomized(layer):
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return layer


def train(world, sizes, steps=2, layout="contiguous_format", three_nodes=(), used=None, momentum=0.1):
    """Compare with the whole batch, which is split over all replicas of all processes, by rank.

    Args:
        world: the processes.
        sizes: the samples of every replica, for every process.
        steps: how many.
        layout: of the inputs.
        three_nodes: the processes in which a hook intercepts the saved tensors of the first replica.
        used: the replicas whose outputs are in the loss, counted over all processes; None for all.
        momentum: the layers'.

    Returns:
        The number of shares of the node of this process, for every step.
    """
    layer = randomized(SynchronizedBatchNorm2d(C, eps=0.3, momentum=momentum, dtype=torch.float64))
    twin = nn.BatchNorm2d(C, eps=0.3, momentum=momentum, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    ranks = range(sum(map(len, sizes[: world.rank])), sum(map(len, sizes[: world.rank + 1])))
    flat = [size for process in sizes for size in process]
    used = range(len(flat)) if used is None else used
    taken = []

    def reduce(shares, how, reduce=one_node.reduce):
        taken.append(len(shares))
        return reduce(shares, how)

    for _ in range(steps):
        layer.zero_grad()
        twin.zero_grad()
        whole = (torch.randn(sum(flat), C, 3, 5, dtype=torch.float64) * 3 + 1).requires_grad_()
        weights = torch.randn(whole.shape, dtype=torch.float64).split(flat)
        chunks = [chunk.to(memory_format=getattr(torch, layout)) for chunk in whole.detach().split(flat)]
        inputs = [chunks[rank].clone().requires_grad_() for rank in ranks]

        def forward(replica, rank, inputs=inputs):
            if rank or world.rank not in three_nodes:
                return replica(inputs[rank])
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                return replica(inputs[rank])

        with mock.patch.object(one_node, "reduce", reduce):
            outputs = Replicas(layer, len(inputs)).run(forward)
        sum((y * weights[rank]).sum() for rank, y in zip(ranks, outputs) if rank in used).backward()
        wholes = twin(whole).split(flat)
        sum((wholes[rank] * weights[rank]).sum() for rank in used).backward()

        torch.testing.assert_close(outputs, [wholes[rank] for rank in ranks], **EXACT)
        dx = whole.grad.split(flat)
        torch.testing.assert_close([x.grad for x in inputs], [dx[rank] for rank in ranks], **EXACT)
        expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
        torch.testing.assert_close(world.total_gradients(layer), expected, **EXACT)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()), **EXACT)
    return taken


def in_one_node(*shares):
    """Run `train` in each process; return its results, or nothing if torch does not report hooks."""
    return [[] if may_be_intercepted() else list(each) for each in shares]


SEVERAL = [
    *([[3], [2]], [[2, 1], [3, 2]], [[1, 1], [1, 1]], [[4], [1, 2, 1]], [[1, 2, 3], [2]]),
    *([[2, 2], [1], [1, 3, 1], [2]],),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("sizes", SEVERAL, ids=str)
def test_replicas_in_every_process_are_one_node(sizes, layout, momentum, processes):
    taken = processes(len(sizes)).run(train, sizes, 2, layout, (), None, momentum)
    assert taken == in_one_node(*([len(process)] * 2 for process in sizes))


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("three_nodes", [[0], [1], [0, 1]], ids=str)
def test_some_processes_may_have_three_nodes(three_nodes, layout, processes):
    taken = processes(2).run(train, [[2, 1], [3, 2]], 2, layout, three_nodes)
    assert taken == in_one_node(*([] if rank in three_nodes else [2, 2] for rank in range(2)))


@pytest.mark.parametrize("sizes", [[[2, 0], [3, 2]], [[2], [0, 3, 0]]], ids=str)
def test_a_process_with_an_empty_replica_has_one_node_too(sizes, processes):
    taken = processes(2).run(train, sizes)
    assert taken == in_one_node(*([len(process)] * 2 for process in sizes))


@pytest.mark.parametrize("used", [[0, 2], [1, 3], [1, 2], [0, 1, 3]], ids=str)
def test_replicas_that_the_loss_ignores_get_their_gradients(used, processes):
    taken = processes(2).run(train, [[2, 1], [3, 2]], 2, "contiguous_format", (), used)
    assert taken == in_one_node([2, 2], [2, 2])


def train_without_joining(world, sizes, not_joining):
    with mock.patch.object(joined_node, "JOINED_UP_TO", -1 if world.rank in not_joining else 2**18):
        return train(world, sizes)


@pytest.mark.parametrize("not_joining", [[0], [1], [0, 1]], ids=str)
def test_processes_may_join_the_batches_of_their_replicas_or_not(not_joining, processes):
    sizes = [[2, 1], [3, 0, 2]]
    taken = processes(2).run(train_without_joining, sizes, not_joining)
    assert taken == in_one_node([2, 2], [3, 3])


class Both(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.second = (randomized(norm(C, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return self.first(x), self.second(x)


def leave_out_the_first_layer(world, where):
    model, twin = Both(SynchronizedBatchNorm2d), Both(nn.BatchNorm2d)
    twin.load_state_dict(model.state_dict())
    sizes = [2, 1, 3, 2]
    whole = torch.randn(8, C, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = [
        whole.detach().split(sizes)[2 * world.rank + rank].clone().requires_grad_() for rank in range(2)
    ]
    weights = torch.randn(2, *whole.shape, dtype=torch.float64)
    weights[0, slice(0, 3) if where == 0 else slice(3, 8)] = 0

    outputs = Replicas(model, 2).run(lambda replica, rank: replica(inputs[rank]))
    used = [1] if world.rank == where else [0, 1]
    parts = weights.split(sizes, dim=1)[2 * world.rank : 2 * world.rank + 2]
    sum((outputs[rank][i] * parts[rank][i]).sum() for rank in range(2) for i in used).backward()
    sum((y * weight).sum() for y, weight in zip(twin(whole), weights)).backward()
    dx = whole.grad.split(sizes)[2 * world.rank : 2 * world.rank + 2]
    torch.testing.assert_close([x.grad for x in inputs], list(dx), **EXACT)
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    torch.testing.assert_close(world.total_gradients(model), expected, **EXACT)


@pytest.mark.parametrize("where", [0, 1])
def test_a_layer_that_one_process_leaves_out_of_its_loss_gets_its_gradients(where, processes):
    processes(2).run(leave_out_the_first_layer, where)
