"""What several files share: a layer that synchronizes, on comm alone, and its whole-batch twin."""

import signal
import sys
import threading

import pytest
import torch
from torch import nn

from syncbn_parallel import replicate


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


class SomebodysDataParallel(nn.DataParallel):
    """Overrides everything, as code does that runs where nn.DataParallel does not: on the CPU.

    Like torch's, its ``parallel_apply`` waits for all threads before it looks at any exception.
    """

    def __init__(self, module, replicas):
        nn.Module.__init__(self)
        self.module = module
        self.device_ids = list(range(replicas))
        self.output_device, self.dim = 0, 0
        self.src_device_obj = torch.device("cpu")

    def scatter(self, inputs, kwargs, device_ids):
        chunks = [(chunk,) for chunk in inputs[0].chunk(len(device_ids))]
        return chunks, [kwargs] * len(chunks)

    def replicate(self, module, device_ids):
        assert module is self.module
        return replicate(module, ["cpu"] * len(device_ids))

    def parallel_apply(self, replicas, inputs, kwargs):
        outcomes = [None] * len(replicas)

        def work(i):
            try:
                outcomes[i] = replicas[i](*inputs[i], **kwargs[i])
            except Exception as error:
                outcomes[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        self.errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if self.errors:
            raise self.errors[0]
        return outcomes

    def gather(self, outputs, output_device):
        return torch.cat(outputs)


@pytest.fixture
def foreign():
    """Return a subclass of nn.DataParallel that somebody else wrote, to make from a module and a number."""
    return SomebodysDataParallel


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
