"""What several files share: a layer that synchronizes, on comm alone, and its whole-batch twin."""

import signal
import sys
import threading

import pytest
import torch
from torch import nn


class GlobalCentre(nn.Module):
    """Subtracts the mean over the samples of all replicas; outside of a replica, over those of its input."""

    replica = None
    name = None

    def __data_parallel_replicate__(self, ctx, copy_id):
        self.replica = ctx.group.member(copy_id)
        self.name = ctx.name

    def forward(self, x):
        if self.replica is None:
            return x - x.mean(0)
        return x - self.replica.exchange((x.sum(0), len(x)), self.merge, where=self.name)

    def merge(self, messages):
        total = sum(total for _, (total, _) in messages)
        count = sum(count for _, (_, count) in messages)
        return [(rank, total / count) for rank, _ in messages]


@pytest.fixture
def centre_class():
    return GlobalCentre


@pytest.fixture
def centred_net():
    """Return a function that builds a float64 net with three synchronizing layers, the same one each time."""

    def build():
        torch.manual_seed(0)
        parts = [(nn.Linear(4, 4), GlobalCentre(), nn.Tanh()) for _ in range(3)]
        return nn.Sequential(*(layer for part in parts for layer in part)).double()

    return build


@pytest.fixture
def worker_count():
    """Return a function that counts the worker threads of this process."""
    return lambda: sum(thread.name == "syncbn-replica" for thread in threading.enumerate())


@pytest.fixture
def no_accelerator(monkeypatch):
    """Let this machine have no accelerator, also where a test before has loaded a simulated one."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: None)
    stock = sys.modules["torch.nn.parallel.data_parallel"]
    monkeypatch.setattr(stock, "_get_available_device_type", lambda: None)


@pytest.fixture
def interrupts_raise():
    """Let SIGINT raise KeyboardInterrupt, also in a job that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
