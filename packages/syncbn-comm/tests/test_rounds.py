from __future__ import annotations

import pytest

from syncbn_comm import SyncMaster


def total(messages):
    return [(identifier, sum(message for _, message in messages)) for identifier, _ in messages]


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


@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_rounds_never_mix(threads, replicas):
    rounds = 200
    master = SyncMaster(total)
    pipes = [master.register_slave(rank) for rank in range(1, replicas)]
    calls = [master.run_master, *(pipe.run_slave for pipe in pipes)]

    def work(call, rank):
        return [call(1000 * turn + rank) for turn in range(rounds)]

    expected = [sum(1000 * turn + rank for rank in range(replicas)) for turn in range(rounds)]
    outcomes = threads.run(*(lambda c=c, r=r: work(c, r) for r, c in enumerate(calls)))
    assert outcomes == [expected] * replicas
