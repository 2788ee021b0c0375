"""Modules written to the protocol of a vendored `sync_batchnorm` folder; only the import is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from syncbn_comm import SyncMaster
from syncbn_parallel import DataParallelWithCallback


class SubtractMean(nn.Module):
    """Has its own master, and registers its slaves in the replication callback; so `y.mean() == 0`."""

    def __init__(self):
        super().__init__()
        self._sync_master = SyncMaster(self._data_parallel_master, timeout=0.5)
        self._is_parallel, self._parallel_id, self._slave_pipe = False, None, None

    def forward(self, x):
        if not (self._is_parallel and self.training):
            return x
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
        assert [rank for rank, _ in messages] == list(range(len(messages)))
        mean = sum(total for _, (total, _) in messages) / sum(count for _, (_, count) in messages)
        return [(rank, mean) for rank, _ in messages]


class RefuseLarge(nn.Module):
    def forward(self, x):
        if x.max() > 1e3:
            raise ValueError("bad batch")
        return x


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(7, 3, dtype=torch.float64)


def assert_synchronized(model, x):
    torch.testing.assert_close(model(x), x - x.mean(0), rtol=1e-12, atol=1e-12)


def test_it_synchronizes_in_every_forward_whatever_the_number_of_replicas(x):
    model = DataParallelWithCallback(SubtractMean(), ["cpu"] * 4)
    for size in (7, 4, 2, 3, 7):
        assert_synchronized(model, x[:size])


def test_evaluation_between_trainings_does_not_matter(x):
    """There the slaves register, and the layer does not synchronize."""
    model = DataParallelWithCallback(SubtractMean(), ["cpu"] * 3)
    assert_synchronized(model, x)
    for size in (7, 2, 7):
        assert torch.equal(model.eval()(x[:size]), x[:size])
    assert_synchronized(model.train(), x)
    assert_synchronized(model, x)


class Sometimes(nn.Module):
    """Calls the layer only on request."""

    def __init__(self):
        super().__init__()
        self.norm = SubtractMean()
        self.reaches = True

    def forward(self, x):
        return self.norm(x) if self.reaches else x


def test_a_forward_that_does_not_reach_the_layer_does_not_matter(x):
    net = Sometimes()
    model = DataParallelWithCallback(net, ["cpu"] * 3)
    for reaches in (True, False, False, True, False, True):
        net.reaches = reaches
        torch.testing.assert_close(model(x), x - x.mean(0) * reaches, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["before the layer", "after the layer"])
def test_a_bad_batch_is_forgotten_by_the_next_good_one(x, order):
    parts = [RefuseLarge(), SubtractMean()]
    model = DataParallelWithCallback(
        nn.Sequential(*parts[:: 1 if order == "before the layer" else -1]), ["cpu"] * 3
    )
    bad = x.clone()
    bad[4] = 1e9
    for _ in range(2):
        assert_synchronized(model, x)
        with pytest.raises(ValueError, match="bad batch"):
            model(bad)
    assert_synchronized(model, x)


def test_two_such_layers_in_one_model_do_not_mix(x):
    model = DataParallelWithCallback(nn.Sequential(SubtractMean(), nn.Tanh(), SubtractMean()), ["cpu"] * 3)
    whole = torch.tanh(x - x.mean(0))
    for _ in range(2):
        torch.testing.assert_close(model(x), whole - whole.mean(0), rtol=1e-12, atol=1e-12)
