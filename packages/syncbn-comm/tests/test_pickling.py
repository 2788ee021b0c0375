"""Pickles and copies carry the callback, the timeout and the name, and no slaves."""

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
def test_a_duplicate_of_a_broken_master_is_not_broken(duplicate):
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


class OldMaster:
    """Pickles as the SyncMaster of a vendored sync_batchnorm folder does: by its callback alone."""

    def __init__(self, callback):
        self.callback = callback

    def __reduce__(self):
        return SyncMaster.__new__, (SyncMaster,), {"master_callback": self.callback}


class OldLayer(Layer):
    def __init__(self):
        self.master = OldMaster(self.answer)


def test_the_state_of_a_vendored_master_can_be_read(threads, monkeypatch):
    monkeypatch.setenv("SYNCBN_TIMEOUT", "20")
    master = through_pickle(OldMaster(total))
    assert type(master) is SyncMaster
    assert (master._callback, master._timeout, master._name) == (total, 20.0, None)
    pipe = master.register_slave(1)
    assert threads.run(lambda: master.run_master(1), lambda: pipe.run_slave(2)) == [3, 3]


def test_the_state_of_a_vendored_master_in_a_cycle_with_its_layer_can_be_read():
    layer = through_pickle(OldLayer())
    assert layer.master.run_master(None) is layer


@pytest.mark.parametrize("state", [{}, {"master_callback": None}, {"callback": total}, (total, 1.0), None])
def test_any_other_state_is_refused_and_shown(state):
    with pytest.raises(SyncError, match=r"expected the pickled state of a SyncMaster, .* got") as caught:
        SyncMaster.__new__(SyncMaster).__setstate__(state)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", [SyncError, BrokenSyncError, SyncTimeoutError, ReplicaLeftError])
def test_errors_can_be_pickled(kind):
    error = through_pickle(kind("timed out"))
    assert type(error) is kind
    assert str(error) == "timed out"
