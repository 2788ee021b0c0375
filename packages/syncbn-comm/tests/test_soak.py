"""A long run in which neither memory nor threads may grow. It runs only if it is selected."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from syncbn_comm import ReplicaGroup

ROUNDS = 1_000_000
CHECKPOINTS = 10
REPLICAS = 4


@pytest.mark.soak
@pytest.mark.time_limit(3700.0)
def test_a_million_rounds_leave_memory_and_threads_as_they_were(threads, capsys):
    group = ReplicaGroup(REPLICAS)
    peaks, thread_counts = [], []
    begin = time.perf_counter()

    def work(replica):
        for _ in range(CHECKPOINTS):
            for turn in range(ROUNDS // CHECKPOINTS):
                if replica.all_reduce(turn + replica.rank) != REPLICAS * turn + 6:
                    raise ValueError(f"rounds were mixed at {turn}")
            if replica.rank == 0:
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                thread_counts.append(threading.active_count())

    join = threads.start(*(lambda rank=rank: work(group.member(rank)) for rank in range(REPLICAS)))
    assert join(within=3600.0) == [None] * REPLICAS
    seconds = time.perf_counter() - begin

    with capsys.disabled():
        print(
            f"\n{ROUNDS:,} rounds of {REPLICAS} replicas in {seconds:.1f} s; "
            f"peak memory after each tenth (KiB): {peaks}; threads: {thread_counts}"
        )
    assert len(set(thread_counts)) == 1
    # The first tenth warms up: the interpreter's caches and the threads' stacks.
    assert peaks[-1] - peaks[0] < 1024
    assert group._rendezvous.calls == {"all_reduce": ROUNDS}
