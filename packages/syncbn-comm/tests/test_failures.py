"""One failure breaks the round for everybody at once, and everybody gets the first failure as the cause."""

from __future__ import annotations

import signal
import threading

import pytest

from syncbn_comm import BrokenSyncError, ReplicaGroup, ReplicaLeftError, SyncError, SyncMaster


class Boom(Exception):
    pass


def fail(messages):
    raise Boom("in the callback")


def barrier(replica):
    replica.barrier(where="layer3.1.bn2")


def assert_stopped_by(outcome, failure, text):
    assert type(outcome) is BrokenSyncError
    assert outcome.__cause__ is failure
    assert str(outcome) == text


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("culprit", ["master", "first", "last"])
@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_replica_that_raises_stops_all_others(threads, world_size, culprit, kind):
    rank = {"master": 0, "first": 1, "last": world_size - 1}[culprit]
    boom = kind("boom")

    def work(replica):
        barrier(replica)
        if replica.rank == rank:
            raise boom
        barrier(replica)

    group = ReplicaGroup(world_size, timeout=None)
    outcomes = threads.run_members(group, *[work] * world_size)
    assert outcomes.pop(rank) is boom
    for outcome in outcomes:
        assert_stopped_by(
            outcome, boom, f"replica {rank} failed after 'layer3.1.bn2' (call 1): {kind.__name__}: boom"
        )
    assert len({id(outcome) for outcome in outcomes}) == world_size - 1
    assert (group.broken, group.failure, group.failed_rank) == (True, boom, rank)


def test_a_failure_before_the_first_rendezvous_is_reported_as_such(threads):
    boom = Boom("first line\nsecond line")

    def work(replica):
        if replica.rank == 1:
            raise boom
        barrier(replica)

    outcomes = threads.run_members(ReplicaGroup(2, timeout=None), work, work)
    assert_stopped_by(
        outcomes[0], boom, "replica 1 failed before it synchronized for the first time: Boom: first line"
    )


def test_an_exception_without_a_message_is_named_by_its_class(threads):
    group = ReplicaGroup(2, name="focal-loss")
    group.abort(Boom())
    with pytest.raises(BrokenSyncError, match=r"^focal-loss: aborted: Boom$"):
        group.member(0).barrier()


def test_an_exception_whose_str_raises_still_stops_everybody(threads):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    boom = Mute()

    def work(replica):
        if replica.rank == 1:
            raise boom
        barrier(replica)

    outcomes = threads.run_members(ReplicaGroup(2, timeout=None), work, work)
    text = "replica 1 failed before it synchronized for the first time: Mute: (its message cannot be shown)"
    assert_stopped_by(outcomes[0], boom, text)


def test_a_failure_after_the_last_rendezvous_is_placed_there(threads):
    group = ReplicaGroup(2)
    threads.run_members(group, barrier, barrier)
    group.abort(Boom("late"), rank=1)
    with pytest.raises(BrokenSyncError, match=r"^replica 1 failed after 'layer3.1.bn2' \(call 1\): Boom: la"):
        group.member(0).barrier()


def test_the_master_gets_the_exception_of_the_callback_and_the_others_a_broken_sync_error(threads):
    master = SyncMaster(fail, timeout=None, name="layer1.bn1")
    pipes = [master.register_slave(rank) for rank in (1, 2)]
    outcomes = threads.run(
        lambda: master.run_master(0), lambda: pipes[0].run_slave(1), lambda: pipes[1].run_slave(2)
    )
    assert type(outcomes[0]) is Boom
    for outcome in outcomes[1:]:
        assert_stopped_by(
            outcome,
            outcomes[0],
            "replica 0 failed while combining at 'layer1.bn1' (call 1): Boom: in the callback",
        )


def test_a_broken_master_says_so_on_every_call_until_it_is_reset():
    master = SyncMaster(fail)
    pipe = master.register_slave(1)
    boom = Boom("enough")
    master.abort(boom)
    for call in (lambda: master.run_master(0), lambda: pipe.run_slave(1)) * 2:
        assert master.broken
        with pytest.raises(BrokenSyncError, match=r"^aborted: Boom: enough$") as caught:
            call()
        assert caught.value.__cause__ is boom
    master.reset()
    assert not master.broken
    assert master.register_slave(1).identifier == 1


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([(0, "a")], r"expected the callback to answer each of \[0, 1\] once, got answers for \[0\]"),
        ([(0, "a"), (1, "b"), (2, "c")], r"got answers for \[0, 1, 2\]"),
        ([(0, "a"), (0, "b"), (1, "c")], r"got answers for \[0, 0, 1\]"),
        ([(0, "a"), (2, "b")], r"got answers for \[0, 2\]"),
        (None, r"expected the callback to return a list of \(identifier, result\) pairs, got None"),
        ([1, 2], r"expected the callback to return a list of \(identifier, result\) pairs, got \[1, 2\]"),
    ],
)
def test_a_callback_that_answers_wrongly_breaks_the_round_for_all(threads, answers, text):
    master = SyncMaster(lambda messages: answers, timeout=None)
    pipe = master.register_slave(1)
    of_master, of_slave = threads.run(lambda: master.run_master(0), lambda: pipe.run_slave(1))
    assert isinstance(of_master, SyncError)
    with pytest.raises(ValueError, match=text):
        raise of_master
    assert of_slave.__cause__ is of_master


def test_abort_from_any_thread_stops_everybody_who_waits_or_will_wait(threads, waiting):
    master = SyncMaster(fail, timeout=None)
    pipes = [master.register_slave(rank) for rank in (1, 2)]
    join = threads.start(lambda: master.run_master(0), lambda: pipes[0].run_slave(1))
    waiting(master, 0, 1)
    boom = Boom("from outside")
    master.abort(boom)
    for outcome in [*join(), *threads.run(lambda: pipes[1].run_slave(2))]:
        assert_stopped_by(outcome, boom, "aborted: Boom: from outside")


def test_the_first_failure_wins():
    group = ReplicaGroup(3)
    first = Boom("first")
    group.abort(first, rank=2)
    group.abort(Boom("second"), rank=1)
    with pytest.raises(Boom, match="third"), group.member(0):
        raise Boom("third")
    assert group.failure is first
    assert group.failed_rank == 2


def test_a_sync_error_keeps_its_class_for_the_others():
    group = ReplicaGroup(2)
    inner = ReplicaLeftError("replica 3 finished")
    group.abort(inner, rank=0)
    with pytest.raises(ReplicaLeftError, match="ReplicaLeftError: replica 3 finished") as caught:
        group.member(1).barrier()
    assert caught.value is not inner
    assert caught.value.__cause__ is inner


def test_a_result_that_was_handed_over_is_not_lost_to_a_later_failure(threads):
    """The round was complete, so both return from it; only their next call fails."""

    def work(replica):
        result = replica.all_reduce(1)
        replica.group.abort(Boom())
        return result

    assert threads.run_members(ReplicaGroup(2), work, work) == [2, 2]


@pytest.fixture
def interrupts():
    """Make SIGINT raise KeyboardInterrupt, also in a job that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_in_a_wait_of_the_main_thread_breaks_the_round_and_goes_on_as_it_is(threads, waiting):
    group = ReplicaGroup(3, timeout=None)
    join = threads.start(lambda: group.member(1).barrier())

    def interrupt():
        waiting(group, 0, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    interrupter = threads.start(interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        group.member(0).barrier()
    assert interrupter() == [None]
    assert_stopped_by(
        join()[0], caught.value, "replica 0 failed while waiting at 'barrier' (call 1): KeyboardInterrupt"
    )


def test_a_failure_during_the_combination_stops_rank_0_too(threads, waiting):
    boom = Boom("meanwhile")

    def abort_meanwhile(messages):
        group.abort(boom)
        return messages

    group = ReplicaGroup(2, timeout=None)
    for outcome in threads.run_members(group, *[lambda r: r.exchange(0, abort_meanwhile)] * 2):
        assert_stopped_by(outcome, boom, "aborted: Boom: meanwhile")


def test_a_failed_member_without_a_with_block_still_stops_the_others(threads):
    group = ReplicaGroup(2, timeout=None)
    of_zero, of_one = threads.run(*(lambda r=rank: group.member(r).exchange(0, fail) for rank in range(2)))
    assert type(of_zero) is Boom
    assert of_one.__cause__ is of_zero
