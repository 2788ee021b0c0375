"""Gradients that are equal bit for bit, whatever the threads did before."""

import random
import threading

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback, _workers
from syncbn_parallel._sequence_numbers import raise_sequence_number, sequence_number

REPLICAS = 3


class FanOut(nn.Module):
    """One tensor feeds three layers, so three gradients are added in it, and their order shows."""

    def __init__(self, centre_class):
        super().__init__()
        self.stem = nn.Linear(5, 7)
        self.branches = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.centres = nn.ModuleList(centre_class() for _ in range(3))

    def forward(self, x):
        h = self.stem(x).tanh()
        return sum(c(b(h)).sigmoid() * (i + 1) for i, (b, c) in enumerate(zip(self.branches, self.centres)))


class Unrelated(nn.Module):
    """Makes another number of autograd nodes in each replica."""

    def forward(self, x):
        y = x
        for _ in range(random.randrange(200)):
            y = y * 1.0
        return y


@pytest.fixture
def gradients(centre_class):
    """Return a function that computes gradients after the threads have done something else."""
    torch.manual_seed(0)
    model = DataParallelWithCallback(FanOut(centre_class), ["cpu"] * REPLICAS)
    unrelated = DataParallelWithCallback(Unrelated(), ["cpu"] * REPLICAS)
    x, weights = torch.randn(9, 5), torch.randn(9, 7)

    def compute():
        unrelated(torch.ones(REPLICAS, 1, requires_grad=True))
        Unrelated()(torch.ones(1, requires_grad=True))
        model.zero_grad()
        own = x.clone().requires_grad_()
        (model(own) * weights).sum().backward()
        return torch.cat([g.flatten() for g in (own.grad, *(p.grad for p in model.parameters()))])

    return compute


def test_gradients_are_bitwise_equal_whatever_the_threads_did_before(gradients):
    random.seed(0)
    first = gradients()
    assert all(torch.equal(gradients(), first) for _ in range(40))


def test_without_equal_sequence_numbers_they_are_not(gradients, monkeypatch):
    """Shows that the test above can fail."""
    monkeypatch.setattr(_workers, "raise_sequence_number", lambda target: None)
    random.seed(0)
    first = gradients()
    assert not all(torch.equal(gradients(), first) for _ in range(40))


def test_caller_and_replicas_begin_a_forward_at_one_number():
    class Number(nn.Module):
        def forward(self, x):
            return torch.tensor(sequence_number())

    model = DataParallelWithCallback(Number(), ["cpu"] * REPLICAS)
    unrelated = DataParallelWithCallback(Unrelated(), ["cpu"] * REPLICAS)
    for _ in range(5):
        unrelated(torch.ones(REPLICAS, requires_grad=True))
        numbers = model(torch.ones(REPLICAS)).tolist()
        assert numbers == [sequence_number()] * REPLICAS


def test_a_number_is_raised_exactly_and_never_lowered():
    def raise_twice():
        base = sequence_number()
        raise_sequence_number(base + 1000)
        found.append(sequence_number() - base)
        raise_sequence_number(base)
        found.append(sequence_number() - base)
        _ = torch.ones(1, requires_grad=True) * 2
        found.append(sequence_number() - base)

    found = []
    thread = threading.Thread(target=raise_twice)
    thread.start()
    thread.join(60)
    assert found == [1000, 1000, 1001]
