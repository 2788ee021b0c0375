"""Pickles and copies carry the callback, the time-out and the name, and no slaves."""

from __future__ import annotations

import copy
import pickle

import pytest

from syncbn_comm import BrokenSyncError, ReplicaLeftError, SyncError, SyncMaster, SyncTimeoutError


def total(messages):
    return [(identifier, sum(message for _, message in messages)) for identifier, _ in messages]


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [through_pickle, copy.copy, copy.deepcopy])
def test_a_duplicate_is_a_fresh_master_with_the_same_settings(threads, waiting, duplicate):
    master = SyncMaster(total, timeout=20, name="layer1.bn1")
    pipe = master.register_slave(1)
    join = threads.start(lambda: pipe.run_slave(5))
    waiting(master, 1)

    other = duplicate(master)
    assert (other._callback, other._timeout, other._name) == (total, 20.0, "layer1.bn1")
    assert other.nr_slaves == 0
    assert other.run_master(7) == 7

    assert master.run_master(1) == 6
    assert join() == [6]


@pytest.mark.parametrize("duplicate", [through_pickle, copy.copy, copy.deepcopy])
def test_a_duplicate_of_a_broken_master_is_whole(duplicate):
    master = SyncMaster(total)
    master.abort(RuntimeError())
    assert not duplicate(master).broken


class Layer:
    """Holds a master whose callback is the layer's own method, as layers do."""

    def __init__(self):
        self.master = SyncMaster(self.answer, timeout=None)

    def answer(self, messages):
        return [(identifier, self) for identifier, _ in messages]


@pytest.mark.parametrize("duplicate", [through_pickle, copy.deepcopy])
def test_a_master_in_a_cycle_with_its_layer_goes_along(duplicate):
    layer = duplicate(Layer())
    assert layer.master.run_master(None) is layer
    master = duplicate(Layer().master)
    assert master.run_master(None).master is master


@pytest.mark.parametrize("kind", [SyncError, BrokenSyncError, SyncTimeoutError, ReplicaLeftError])
def test_errors_can_be_pickled(kind):
    error = through_pickle(kind("timed out"))
    assert type(error) is kind
    assert str(error) == "timed out"
