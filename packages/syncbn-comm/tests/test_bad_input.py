"""Misuse raises an error that says what was expected, what was given, and where; nothing hangs or breaks."""

from __future__ import annotations

import pytest

from syncbn_comm import ReplicaGroup, SyncMaster


@pytest.mark.parametrize("world_size", [0, -1, 2.0, "2", None])
def test_a_group_has_at_least_one_replica(world_size):
    with pytest.raises(ValueError, match="expected world_size to be an integer of at least 1, got"):
        ReplicaGroup(world_size)


@pytest.mark.parametrize("rank", [-1, 2, "0", None])
def test_a_rank_that_does_not_exist_is_refused(rank):
    with pytest.raises(ValueError, match=r"expected rank to be from 0 to 1, got"):
        ReplicaGroup(2).member(rank)
    if rank is not None:
        with pytest.raises(ValueError, match=r"expected rank to be from 0 to 1, got"):
            ReplicaGroup(2).abort(RuntimeError(), rank=rank)


def test_a_callback_has_to_be_callable(threads):
    with pytest.raises(ValueError, match="expected a callback that can be called, got None"):
        SyncMaster(None)
    group = ReplicaGroup(2, timeout=None)
    of_zero, of_one = threads.run_members(group, *[lambda r: r.exchange(1, None, where="bn1")] * 2)
    assert str(of_zero) == "expected a callback at 'bn1' from replica 0, got None"
    assert of_one.__cause__ is of_zero


@pytest.mark.parametrize("target", [SyncMaster(list), ReplicaGroup(2)])
def test_only_an_exception_can_abort(target):
    with pytest.raises(ValueError, match="expected an exception to abort with, got 'stop'"):
        target.abort("stop")
    assert not target.broken


def test_a_replica_that_has_left_cannot_come_back():
    group = ReplicaGroup(2)
    with group.member(1) as replica:
        pass
    with pytest.raises(ValueError, match="at 'barrier', got replica 1, which has left"):
        replica.barrier()
    with pytest.raises(ValueError, match="got replica 1, which has left"), replica:
        pass
    assert not group.broken


def test_one_member_in_two_threads_is_refused_and_the_wait_goes_on(threads, waiting):
    group = ReplicaGroup(2, timeout=None)
    join = threads.start(lambda: group.member(1).all_reduce(1, where="first"))
    waiting(group, 1)
    text = "expected one call of replica 1 at a time, got one at 'second' while it is at 'first'"
    with pytest.raises(ValueError, match=text):
        group.member(1).barrier(where="second")
    assert threads.run(lambda: group.member(0).all_reduce(1, where="first")) == [2]
    assert join() == [2]


def test_a_call_from_inside_the_callback_is_an_error_and_no_hang(threads):
    group = ReplicaGroup(2, timeout=None)

    def combine(messages):
        group.member(0).barrier(where="inner")
        return messages

    of_zero, of_one = threads.run_members(group, *[lambda r: r.exchange(1, combine, where="outer")] * 2)
    assert str(of_zero) == (
        "expected one call of replica 0 at a time, got one at 'inner' while it is at 'outer'"
    )
    assert of_one.__cause__ is of_zero
