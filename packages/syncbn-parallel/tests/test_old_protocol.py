"""Layers written for the vendored packages: a SyncMaster of their own, which they put on the context."""

import signal
import threading

import pytest
import torch
from torch import nn

from syncbn_comm import BrokenSyncError, ReplicaLeftError, SyncMaster, SyncTimeoutError
from syncbn_parallel import (
    DataParallelWithCallback,
    execute_replication_callbacks,
    patch_replication_callback,
)
from syncbn_parallel import replicate as replicas_of

SECONDS = 60.0  # of waiting, before a test gives up


class BatchMean(nn.Module):
    """Subtracts the mean of all replicas, by the protocol of those packages."""

    def __init__(self):
        super().__init__()
        self._sync_master = SyncMaster(self._data_parallel_master, timeout=SECONDS)
        self._is_parallel, self._parallel_id, self._slave_pipe = False, None, None

    def forward(self, x):
        if not (self._is_parallel and self.training):
            return x - x.mean(0)
        message = (x.sum(0), len(x))
        if self._parallel_id == 0:
            return x - self._sync_master.run_master(message)
        return x - self._slave_pipe.run_slave(message)

    def __data_parallel_replicate__(self, ctx, copy_id):
        self._is_parallel, self._parallel_id = True, copy_id
        if copy_id == 0:
            ctx.sync_master = self._sync_master
        else:
            self._slave_pipe = ctx.sync_master.register_slave(copy_id)

    def _data_parallel_master(self, messages):
        mean = sum(total for _, (total, _) in messages) / sum(count for _, (_, count) in messages)
        return [(identifier, mean) for identifier, _ in messages]


class Picky(nn.Module):
    """Raises, or returns early, where a sample is large; `how` is shared by all copies."""

    def __init__(self, inner, error=None):
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, x):
        if x.max() > 1e3:
            if self.error is None:
                return x
            raise self.error
        return self.inner(x)


@pytest.fixture(params=["ours", "patched"])
def wrap(request, foreign):
    """Return what wraps a module for three replicas."""
    if request.param == "ours":
        return lambda module: DataParallelWithCallback(module, ["cpu"] * 3, timeout=SECONDS)
    return lambda module: patch_replication_callback(foreign(module, 3))


def whole(x):
    return x - x.mean(0)


def test_it_computes_the_whole_batchs_mean_step_after_step_in_training_and_evaluation(wrap):
    x, layer = torch.randn(6, 3).double(), BatchMean()
    model = wrap(layer)
    for training in (True, True, False, False, True, True):
        model.train(training)
        expected = whole(x) if training else torch.cat([whole(part) for part in x.chunk(3)])
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_replica_that_raises_before_such_a_layer_stops_the_others_and_the_next_batch_is_good(wrap, rank):
    error = ValueError("bad batch")
    model = wrap(Picky(BatchMean(), error))
    x = torch.randn(6, 3).double()
    bad = x.clone()
    bad[2 * rank] = 1e9
    for _ in range(2):
        with pytest.raises((ValueError, BrokenSyncError)) as caught:
            model(bad)
        assert caught.value is error or caught.value.__cause__ is error
        assert not isinstance(caught.value, SyncTimeoutError)
        torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_replica_that_returns_early_stops_the_others_and_the_next_batch_is_good(wrap, rank):
    model = wrap(nn.Sequential(Picky(BatchMean())))
    x = torch.randn(6, 3).double()
    bad = x.clone()
    bad[2 * rank] = 1e9
    for _ in range(2):
        with pytest.raises(ReplicaLeftError, match=rf"replica {rank} \(of 0 to 2\) finished.*'0\.inner'"):
            model(bad)
        torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)


def test_a_replica_that_raises_after_such_a_layer_does_not_affect_later_batches(wrap):
    class After(nn.Module):
        def forward(self, x):
            if x.max() > 1e3:
                raise ValueError("bad batch")
            return x

    model = wrap(nn.Sequential(BatchMean(), After()))
    x = torch.randn(6, 3).double()
    bad = x.clone()
    bad[4] = 1e9
    for _ in range(2):
        with pytest.raises(ValueError, match="bad batch"):
            model(bad)
        torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)


def test_a_layer_that_is_called_twice_synchronizes_twice():
    layer = BatchMean()
    x = torch.randn(6, 3).double()
    model = DataParallelWithCallback(nn.Sequential(layer, nn.Tanh(), layer), ["cpu"] * 3, timeout=SECONDS)
    torch.testing.assert_close(model(x), whole(whole(x).tanh()), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("interrupts_raise")
def test_an_interrupt_of_the_caller_ends_a_wait_at_such_a_layer():
    waiting, over = threading.Event(), threading.Event()

    class Busy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = BatchMean()

        def forward(self, x):
            try:
                if x[0, 0] == 0:
                    waiting.set()
                    return self.inner(x)
                assert waiting.wait(SECONDS)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                assert over.wait(SECONDS)
                return x
            finally:
                over.set()

    model = DataParallelWithCallback(Busy(), ["cpu"] * 2, timeout=SECONDS)
    with pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[0.0], [1.0]]))


def test_a_replica_that_fails_outside_of_its_call_reaches_such_a_layer_too(monkeypatch):
    from syncbn_parallel import _data_parallel

    error, original = RuntimeError("no luck"), _data_parallel.CallerState.applied
    ranks = iter(range(3))

    def applied(state, device):
        if next(ranks, None) == 1:
            raise error
        return original(state, device)

    model = DataParallelWithCallback(BatchMean(), ["cpu"] * 3, timeout=SECONDS)
    x = torch.randn(6, 3).double()
    with monkeypatch.context() as patch:
        patch.setattr(_data_parallel.CallerState, "applied", applied)
        with pytest.raises(RuntimeError, match="no luck"):
            model(x)
    torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)


def test_the_callbacks_alone_register_the_slaves():
    layer = BatchMean()
    execute_replication_callbacks(replicas_of(layer, ["cpu"] * 3))
    assert layer._sync_master.nr_slaves == 2
