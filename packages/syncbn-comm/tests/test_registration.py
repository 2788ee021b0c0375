"""When a slave registers, the set it joins is clear, and no round ever mixes two sets."""

from __future__ import annotations

import threading

import pytest

from syncbn_comm import BrokenSyncError, SyncError, SyncMaster


class Boom(Exception):
    pass


def everything(messages):
    return [(identifier, list(messages)) for identifier, _ in messages]


def run_round(threads, master, *pipes, turn="round"):
    """Run one round, in which everybody has to get the messages of exactly these participants."""
    calls = [(0, master.run_master), *((pipe.identifier, pipe.run_slave) for pipe in pipes)]
    outcomes = threads.run(*(lambda key=key, call=call: call((turn, key)) for key, call in calls))
    assert outcomes == [[(key, (turn, key)) for key, _ in calls]] * len(calls)


@pytest.mark.parametrize("identifier", [0, False, 0.0])
def test_the_identifier_of_the_master_is_refused(threads, identifier):
    master = SyncMaster(everything, name="layer1.bn1")
    pipe = master.register_slave(1)
    text = r"expected an identifier other than 0 \(the master's\) at 'layer1\.bn1', got"
    with pytest.raises(SyncError, match=text) as caught:
        master.register_slave(identifier)
    assert isinstance(caught.value, ValueError)
    assert master.nr_slaves == 1
    run_round(threads, master, pipe)


def test_registering_after_a_complete_round_begins_a_new_set(threads):
    master = SyncMaster(everything)
    old = [master.register_slave(rank) for rank in (1, 2)]
    run_round(threads, master, *old)
    assert master.nr_slaves == 2

    new = master.register_slave(3)
    assert master.nr_slaves == 1
    run_round(threads, master, new)
    with pytest.raises(BrokenSyncError, match="registered after a complete round has begun a new set; regis"):
        old[0].run_slave(1)


def test_an_identifier_that_registers_again_before_a_round_begins_a_new_set(threads):
    """As in evaluation, where a model is replicated and its layers do not synchronize."""
    master = SyncMaster(everything, name="layer1.bn1")
    sets = [[master.register_slave(rank) for rank in range(1, size)] for size in (3, 2, 4, 3)]
    assert master.nr_slaves == 2
    run_round(threads, master, *sets[-1])
    text = (
        r"this set of slaves of 'layer1\.bn1' is no longer used: 1, which registered again, has begun a new"
    )
    for old in sets[:-1]:
        for pipe in old:
            with pytest.raises(BrokenSyncError, match=text):
                pipe.run_slave("old")
    assert not master.broken


@pytest.mark.parametrize("waiter", ["master", "slave"])
def test_a_taken_identifier_is_refused_while_somebody_waits_and_the_round_goes_on(threads, waiting, waiter):
    master = SyncMaster(everything, timeout=None)
    pipes = [master.register_slave(rank) for rank in (1, 2)]
    calls = {0: master.run_master, 1: pipes[0].run_slave, 2: pipes[1].run_slave}
    first = 0 if waiter == "master" else 2
    join = threads.start(lambda: calls[first](first))
    waiting(master, first)
    text = f"^expected 1 to register before the round, got a registration while replica {first} waits$"
    with pytest.raises(SyncError, match=text) as caught:
        master.register_slave(1)
    assert isinstance(caught.value, ValueError)
    rest = [rank for rank in calls if rank != first]
    outcomes = [*threads.run(*(lambda rank=rank: calls[rank](rank) for rank in rest)), *join()]
    assert outcomes == [[(0, 0), (1, 1), (2, 2)]] * 3


def test_a_new_identifier_joins_the_round_for_which_others_wait_already(threads, waiting):
    master = SyncMaster(everything, timeout=None)
    first = master.register_slave(1)
    join = threads.start(lambda: first.run_slave(1))
    waiting(master, 1)
    second = master.register_slave(2)
    outcomes = threads.run(lambda: master.run_master(0), lambda: second.run_slave(2))
    assert [*outcomes, *join()] == [[(0, 0), (1, 1), (2, 2)]] * 3


def test_nobody_can_register_while_the_next_round_of_a_set_is_under_way(threads, waiting):
    master = SyncMaster(everything, timeout=None)
    pipes = [master.register_slave(rank) for rank in (1, 2)]
    run_round(threads, master, *pipes)
    joins = [threads.start(lambda: pipes[0].run_slave(1)), threads.start(lambda: pipes[1].run_slave(2))]
    waiting(master, 1, 2)
    for newcomer in (1, 3):
        with pytest.raises(ValueError, match=r"got a registration while replicas 1, 2 wait$"):
            master.register_slave(newcomer)
    assert [master.run_master(0), *joins[0](), *joins[1]()] == [[(0, 0), (1, 1), (2, 2)]] * 3


@pytest.mark.parametrize("newcomer", [1, 2])
def test_nobody_can_register_while_the_callback_runs(threads, newcomer):
    refused = []

    def callback(messages):
        with pytest.raises(
            ValueError, match=rf"expected {newcomer} to register before the round, got a registration dur"
        ):
            master.register_slave(newcomer)
        refused.append(newcomer)
        return everything(messages)

    master = SyncMaster(callback, timeout=None)
    pipe = master.register_slave(1)
    for _ in range(2):
        run_round(threads, master, pipe)
    assert refused == [newcomer] * 2
    assert master.nr_slaves == 1


@pytest.mark.parametrize("newcomer", [1, 3])
def test_registering_after_a_failure_begins_a_new_set_and_old_pipes_stay_broken(threads, newcomer):
    master = SyncMaster(everything, timeout=None)
    old = [master.register_slave(rank) for rank in (1, 2)]
    boom = Boom("bad batch")
    master.abort(boom)
    new = [master.register_slave(newcomer), master.register_slave(4)]
    assert not master.broken
    assert master.nr_slaves == 2
    for turn in range(2):
        for pipe in old:
            with pytest.raises(BrokenSyncError, match=r"^aborted: Boom: bad batch$") as caught:
                pipe.run_slave("old")
            assert caught.value.__cause__ is boom
        run_round(threads, master, *new, turn=turn)


def test_a_callback_that_fails_is_forgotten_by_the_next_registration(threads):
    answers = [everything, lambda messages: [][0]]
    master = SyncMaster(lambda messages: answers.pop()(messages), timeout=None)
    pipe = master.register_slave(1)
    of_master, of_slave = threads.run(lambda: master.run_master(0), lambda: pipe.run_slave(1))
    assert type(of_master) is IndexError
    assert of_slave.__cause__ is of_master
    run_round(threads, master, master.register_slave(1))


def test_an_old_pipe_that_is_used_during_a_new_round_does_not_join_it(threads, waiting):
    master = SyncMaster(everything, timeout=None)
    old = master.register_slave(1)
    new = master.register_slave(1)
    join = threads.start(lambda: master.run_master("m"))
    waiting(master, 0)
    (outcome,) = threads.run(lambda: old.run_slave("old"))
    assert isinstance(outcome, BrokenSyncError)
    assert [new.run_slave("new"), *join()] == [[(0, "m"), (1, "new")]] * 2


def test_a_slow_slave_still_gets_its_result_after_a_new_set_has_begun(threads, waiting):
    """The slow one is stopped in the last step of its round, when its result has been handed to it."""
    master = SyncMaster(everything, timeout=None)
    pipe = master.register_slave(1)
    registered = threading.Event()
    participant = master._set.participants[1]
    wake = participant.wake

    class SlowWake:
        release = wake.release

        @staticmethod
        def acquire(blocking, timeout):
            acquired = wake.acquire(blocking, timeout)
            assert registered.wait(10)
            return acquired

    participant.wake = SlowWake()
    join = threads.start(lambda: pipe.run_slave(1))
    waiting(master, 1)
    assert master.run_master(0) == [(0, 0), (1, 1)]
    new = master.register_slave(1)
    registered.set()
    assert join() == [[(0, 0), (1, 1)]]
    run_round(threads, master, new)


def test_the_keywords_of_the_vendored_folder_work():
    master = SyncMaster(master_callback=everything)
    assert master.run_master(master_msg="m") == [(0, "m")]
