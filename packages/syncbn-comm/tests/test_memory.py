"""What a round was about does not outlive it, and needs no garbage collector to go."""

from __future__ import annotations

import gc
import weakref

import pytest

from syncbn_comm import BrokenSyncError, FutureResult, ReplicaGroup, SyncMaster


class Thing:
    """A message or a result that can be watched."""


@pytest.fixture(autouse=True)
def no_garbage_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_no_message_result_or_callback_outlives_a_round(threads):
    group = ReplicaGroup(3)
    watched = []

    def work(replica):
        message = Thing()

        def combine(messages):
            results = [(rank, Thing()) for rank, _ in messages]
            watched.extend(weakref.ref(result) for _, result in results)
            return results

        watched.extend((weakref.ref(message), weakref.ref(combine)))
        replica.exchange(message, combine)

    replicas = [group.member(rank) for rank in range(3)]  # kept, so that they are what is looked at
    threads.run(*(lambda replica=replica: work(replica) for replica in replicas))
    assert len(watched) == 9
    assert [ref() for ref in watched] == [None] * 9


def test_no_message_outlives_a_broken_round(threads, waiting):
    master = SyncMaster(list, timeout=None)
    pipes = [master.register_slave(rank) for rank in (1, 2)]
    watched = []

    def work():
        message = Thing()
        watched.append(weakref.ref(message))
        try:
            pipes[0].run_slave(message)
        except BrokenSyncError:
            return "told"

    join = threads.start(work)
    waiting(master, 1)
    master.abort(RuntimeError("enough"))
    assert join() == ["told"]
    assert watched[0]() is None


def test_no_message_outlives_a_combination_whose_round_broke(threads):
    group = ReplicaGroup(2, timeout=None)
    watched = []

    def abort_meanwhile(messages):
        group.abort(RuntimeError("enough"))
        return messages

    def work(replica):
        message = Thing()
        watched.append(weakref.ref(message))
        try:
            replica.exchange(message, abort_meanwhile)
        except BrokenSyncError:
            return "told"

    assert threads.run_members(group, work, work) == ["told", "told"]
    assert [ref() for ref in watched] == [None, None]


def test_a_group_dies_with_its_last_reference(threads):
    group = ReplicaGroup(2)
    threads.run_members(group, *[lambda r: r.all_reduce(1)] * 2)
    watched = [weakref.ref(group), weakref.ref(group.member(0)), weakref.ref(group._rendezvous)]
    del group
    assert [ref() for ref in watched] == [None] * 3


def test_a_forgotten_failure_takes_its_frames_along_and_leaves_the_group_broken(threads):
    group = ReplicaGroup(2)
    watched = []

    def fail(replica):
        thing = Thing()
        watched.append(weakref.ref(thing))
        raise KeyError("first")

    def attempt():
        with pytest.raises(KeyError), group.member(0) as replica:
            fail(replica)

    threads.run(attempt)
    assert watched[0]() is not None
    group.forget_failure()
    assert watched[0]() is None
    assert group.broken
    with pytest.raises(BrokenSyncError, match="first"):
        group.member(1).barrier()


def test_there_may_be_no_failure_to_forget(threads):
    group = ReplicaGroup(2)
    group.forget_failure()
    assert threads.run_members(group, *[lambda r: r.all_reduce(1)] * 2) == [2, 2]


def test_a_forgotten_set_dies_with_its_pipes(threads):
    master = SyncMaster(list)
    pipes = [master.register_slave(1)]
    threads.run(lambda: master.run_master(0), lambda: pipes[0].run_slave(1))
    old = weakref.ref(master._set)
    master.register_slave(1)
    assert old() is not None
    pipes.clear()
    assert old() is None


def test_a_fetched_future_keeps_nothing():
    future, thing = FutureResult(), Thing()
    ref = weakref.ref(thing)
    future.put(thing)
    del thing
    assert future.get() is ref()
    assert ref() is None
