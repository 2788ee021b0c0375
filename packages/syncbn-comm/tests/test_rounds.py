from __future__ import annotations

import itertools
import threading

import pytest

from syncbn_comm import BrokenSyncError, ReplicaGroup, SyncMaster


def everything(messages):
    return [(identifier, list(messages)) for identifier, _ in messages]


def test_a_round_gives_everybody_its_own_result(threads):
    def shares(messages):
        whole = sum(message for _, message in messages)
        return [(identifier, message / whole) for identifier, message in messages]

    master = SyncMaster(shares)
    pipes = [master.register_slave(rank) for rank in (1, 2)]
    results = threads.run(
        lambda: master.run_master(1.0), lambda: pipes[0].run_slave(2.0), lambda: pipes[1].run_slave(5.0)
    )
    assert results == [0.125, 0.25, 0.625]


@pytest.mark.parametrize("arrivals", list(itertools.permutations(range(3))))
def test_messages_come_in_the_order_of_registration_whatever_the_order_of_arrival(threads, waiting, arrivals):
    master = SyncMaster(everything)
    pipes = [master.register_slave(name) for name in ("late", "early")]
    calls = [
        lambda: master.run_master("m"),
        lambda: pipes[0].run_slave("l"),
        lambda: pipes[1].run_slave("e"),
    ]
    joins = []
    for arrival in arrivals:
        joins.append(threads.start(calls[arrival]))
        if len(joins) < 3:
            waiting(master, (0, "late", "early")[arrival])
    expected = [(0, "m"), ("late", "l"), ("early", "e")]
    assert [join() for join in joins] == [[expected]] * 3


def test_the_callback_runs_once_per_round_in_the_thread_of_the_master(threads):
    ran_in = []

    def callback(messages):
        ran_in.append(threading.get_ident())
        return messages

    master = SyncMaster(callback)
    pipe = master.register_slave(1)

    def as_master():
        master.run_master(None)
        master.run_master(None)
        return threading.get_ident()

    ident, _ = threads.run(as_master, lambda: [pipe.run_slave(None), pipe.run_slave(None)])
    assert ran_in == [ident, ident]


def test_answers_may_come_in_any_order_and_from_any_iterable(threads):
    master = SyncMaster(lambda messages: reversed([(key, 10 * message) for key, message in messages]))
    pipe = master.register_slave(1)
    assert threads.run(lambda: master.run_master(1), lambda: pipe.run_slave(2)) == [10, 20]


def test_messages_and_results_may_be_any_objects(threads):
    message, result = object(), object()
    seen = []

    def callback(messages):
        seen.extend(messages)
        return [(0, None), (1, result)]

    master = SyncMaster(callback)
    pipe = master.register_slave(1)
    assert threads.run(lambda: master.run_master(None), lambda: pipe.run_slave(message)) == [None, result]
    assert seen == [(0, None), (1, message)]


@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_rounds_never_mix(threads, replicas):
    rounds = 200
    master = SyncMaster(everything)
    pipes = [master.register_slave(rank) for rank in range(1, replicas)]
    calls = [master.run_master, *(pipe.run_slave for pipe in pipes)]

    def work(rank):
        return [calls[rank]((turn, rank)) for turn in range(rounds)]

    expected = [[(rank, (turn, rank)) for rank in range(replicas)] for turn in range(rounds)]
    outcomes = threads.run(*(lambda rank=rank: work(rank) for rank in range(replicas)))
    assert outcomes == [expected] * replicas


def test_a_fast_slave_may_post_again_before_a_slow_one_has_fetched(threads, waiting):
    """The slow one is stopped in the last step of its round, when its result has been handed to it."""
    group = ReplicaGroup(2)
    release_slow = threading.Event()
    slow_participant = group._rendezvous.participants[1]
    wake = slow_participant.wake

    class SlowWake:
        release = wake.release

        @staticmethod
        def acquire(blocking, timeout):
            acquired = wake.acquire(blocking, timeout)
            release_slow.wait(10)
            return acquired

    slow_participant.wake = SlowWake()
    slow = threads.start(lambda: [group.member(1).all_gather(turn) for turn in ("a", "b")])
    fast = threads.start(lambda: [group.member(0).all_gather(turn) for turn in (0, 1)])
    # The fast one waits in its second round, and the slow one's first result is not fetched.
    waiting(group, 0, rounds=1)
    assert slow_participant.slot == [0, "a"]
    release_slow.set()
    assert slow() == fast() == [[[0, "a"], [1, "b"]]]


def test_a_round_without_slaves_returns_at_once():
    assert SyncMaster(everything).run_master("alone") == [(0, "alone")]


def test_reset_makes_an_empty_set_and_old_pipes_say_so():
    master = SyncMaster(everything, name="layer1.bn1")
    pipe = master.register_slave(1)
    master.reset()
    assert master.nr_slaves == 0
    assert not master.broken
    assert master.run_master("alone") == [(0, "alone")]
    with pytest.raises(BrokenSyncError, match=r"'layer1\.bn1' is no longer used: the master has been reset"):
        pipe.run_slave(1)


def test_an_old_pipe_after_a_failure_still_shows_the_failure():
    master = SyncMaster(everything)
    pipe = master.register_slave(1)
    boom = ValueError("boom")
    master.abort(boom)
    master.reset()
    with pytest.raises(BrokenSyncError, match="the master has been reset") as caught:
        pipe.run_slave(1)
    assert caught.value.__cause__.__cause__ is boom


def test_reset_stops_slaves_that_wait(threads, waiting):
    master = SyncMaster(everything, timeout=None)
    pipes = [master.register_slave(rank) for rank in (1, 2)]
    join = threads.start(lambda: pipes[0].run_slave(1))
    waiting(master, 1)
    master.reset()
    (outcome,) = join()
    assert type(outcome) is BrokenSyncError
    assert "the master has been reset" in str(outcome)


def test_a_pipe_knows_its_identifier():
    assert SyncMaster(everything).register_slave("left").identifier == "left"
