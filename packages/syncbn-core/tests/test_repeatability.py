"""The same numbers, bit for bit, however the threads of the replicas interleave."""

import itertools
import threading

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm1d

pytestmark = pytest.mark.usefixtures("graph_kind")

WORLD_SIZE = 3
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])


class FanOut(nn.Module):
    """One tensor feeds three layers, so that the order in which gradients are added shows in the last bit."""

    def __init__(self, fused):
        super().__init__()
        self.norms = nn.ModuleList(SynchronizedBatchNorm1d(5, fused=fused) for _ in range(4))

    def forward(self, x, before_each_layer=lambda: None):
        before_each_layer()
        x = self.norms[0](x).tanh()
        total = 0
        for norm in self.norms[1:]:
            before_each_layer()
            total = total + norm(x).sigmoid()
        return total


class InOrder:
    """Lets the replicas arrive at every layer in a given order, each when the previous one waits."""

    def __init__(self, order):
        self._order = order
        self._turn = 0
        self._changed = threading.Condition()

    def come(self, rank):
        with self._changed:
            assert self._changed.wait_for(lambda: self._order[self._turn % len(self._order)] == rank, 30)
            self._turn += 1
            self._changed.notify_all()


def train(replicas_of, weighted_sum, fused, order=None):
    """All results of one step, as bytes."""
    torch.manual_seed(0)
    model = FanOut(fused)
    inputs = [torch.randn(size, 5, requires_grad=True) for size in (7, 4, 6)]
    schedule = InOrder(order) if order is not None else None

    def forward(replica, rank):
        return replica(inputs[rank], (lambda: schedule.come(rank)) if schedule else lambda: None)

    outputs = replicas_of(model, WORLD_SIZE).run(forward)
    weighted_sum(torch.cat(outputs)).backward()
    made = [*outputs, *(x.grad for x in inputs), *(p.grad for p in model.parameters()), *model.buffers()]
    return b"".join(tensor.detach().numpy().tobytes() for tensor in made)


@FUSED
def test_every_order_of_arrival_gives_the_same_bits(fused, replicas_of, weighted_sum):
    made = {
        train(replicas_of, weighted_sum, fused, order) for order in itertools.permutations(range(WORLD_SIZE))
    }
    assert len(made) == 1


@FUSED
def test_free_running_threads_give_the_same_bits_again_and_again(fused, replicas_of, weighted_sum):
    assert len({train(replicas_of, weighted_sum, fused) for _ in range(20)}) == 1
