"""Replicas and processes: all processes issue the collectives of a backward in one order.

Autograd runs ready nodes in the order of their sequence numbers. Here the numbers of the Merge nodes are
random and differ between processes.
"""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FEW, MANY = 40, 200  # repetitions


class Branches(nn.Module):
    """Four parallel branches of different widths, joined by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, width, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, 3, 1),
                nn.BatchNorm2d(3),
            )
            for width in (2, 3, 5, 6)
        )

    def forward(self, x):
        stem = self.stem(x)
        return sum(branch(stem) for branch in self.branches)


def repeat_backward(world, replicas, ddp, repetitions=MANY):
    torch.manual_seed(0)
    twin = Branches().double()
    model = Branches().double()
    model.load_state_dict(twin.state_dict())
    model = DataParallelWithCallback(convert_model(model), ["cpu"] * replicas)
    called = DistributedDataParallel(model) if ddp else model
    for repetition in range(repetitions):
        for module in (model, twin):
            module.zero_grad()
        whole = torch.randn(12, 3, 2, 2, dtype=torch.float64)
        weights = torch.randn(12, 3, 2, 2, dtype=torch.float64)
        loss = (called(world.share(whole)) * world.share(weights)).sum()
        shuffled = world.shuffle_sequence(loss, repetition)
        assert shuffled == 9, shuffled
        loss.backward()
        (twin(whole) * weights).sum().backward()
        # DDP's averages are the same in all processes.
        ours = [total / (world.size if ddp else 1) for total in world.total_gradients(model).values()]
        theirs = [p.grad / (world.size if ddp else 1) for p in twin.parameters()]
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(
    ("replicas", "ddp", "repetitions"),
    [
        *((1, True, FEW), (3, False, FEW)),
        *(pytest.param(r, ddp, MANY, marks=pytest.mark.full) for r in (1, 3) for ddp in (False, True)),
    ],
)
def test_backward_is_right_in_every_repetition(replicas, ddp, repetitions, processes):
    processes(2).run(repeat_backward, replicas, ddp, repetitions)


def repeat_backward_without_chains(world, replicas, ddp):
    from syncbn_core import _base
    from syncbn_core._processes import backward_order

    _base.chain_of = lambda x, group: backward_order.Chain()  # one for each node
    repeat_backward(world, replicas, ddp)


@pytest.mark.full  # core has the same for one replica in each process
@pytest.mark.parametrize("ddp", [False, True], ids=["bare", "ddp"])
def test_without_the_chains_it_is_not(ddp, new_processes):
    outcomes = new_processes(2, group_seconds=5).outcomes(repeat_backward_without_chains, 3, ddp)
    # Mixed up, or a timeout, or gloo ends the process: never right.
    assert all(outcome is None or "error" in outcome for outcome in outcomes)
