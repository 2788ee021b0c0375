"""All processes issue the collectives of a backward in one order, even if they differ otherwise.

Autograd runs the nodes that are ready in the order of their sequence numbers. Here the numbers of the Merge
nodes are random and differ between processes, so only the graph itself enforces an order.
"""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm2d

EXACT = {"rtol": 1e-10, "atol": 1e-10}
REPETITIONS = 200


class Branches(nn.Module):
    """Four parallel branches of different widths behind one layer, joined by a sum."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, width, 1), norm(width), nn.ReLU(), nn.Conv2d(width, 3, 1), norm(3))
            for width in (2, 3, 5, 6)
        )

    def forward(self, x):
        stem = self.stem(x)
        return sum(branch(stem) for branch in self.branches)


def build(norm):
    torch.manual_seed(0)
    return Branches(norm).double()


def assert_same_gradients(world, model, twin):
    expected = {name: p.grad for name, p in twin.named_parameters()}
    torch.testing.assert_close(world.total_gradients(model), expected, **EXACT)


def repeat_backward(world, repetitions):
    model, twin = build(SynchronizedBatchNorm2d), build(nn.BatchNorm2d)
    for repetition in range(repetitions):
        model.zero_grad()
        twin.zero_grad()
        whole = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        weights = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        loss = (model(world.share(whole)) * world.share(weights)).sum()
        shuffled = world.shuffle_sequence(loss, repetition)
        assert shuffled == 9, shuffled
        loss.backward()
        (twin(whole) * weights).sum().backward()
        assert_same_gradients(world, model, twin)


@pytest.mark.parametrize(
    ("world_size", "repetitions"),
    [
        *((2, 50), (4, 5)),
        *(pytest.param(*more, marks=pytest.mark.full) for more in ((2, REPETITIONS), (4, 20))),
    ],
)
def test_backward_is_right_in_every_repetition(world_size, repetitions, processes):
    processes(world_size).run(repeat_backward, repetitions)


def repeat_backward_without_chains(world, repetitions):
    from syncbn_core import _base
    from syncbn_core._processes import backward_order

    _base.chain_of = lambda x, group: backward_order.Chain()  # one for each node
    repeat_backward(world, repetitions)


def test_without_the_chains_it_is_not(new_processes):
    outcomes = new_processes(2, group_seconds=5).outcomes(repeat_backward_without_chains, REPETITIONS)
    # Mixed up, or a timeout, or gloo ends the process: never right.
    assert all(outcome is None or "error" in outcome for outcome in outcomes)
