"""One round of the comm layer beside bare locks that hand over in the same pattern.

In every round each of R threads arrives, the last one wakes the first, and that wakes all the others. The
bare locks do only this; a `ReplicaGroup` and a `SyncMaster` also carry messages, combine them, and watch
for failures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from report import Target, save, target_table, timing_table
from side_by_side import Row, hand_over, measure, options_of, under_each_setting

from syncbn_comm import ReplicaGroup, SyncMaster

SIZES = (2, 4, 8, 16, 32, 64)
ROUNDS = 100  # in one step; each time is that of one round
Meet = Callable[[int], Callable[[], object]]
"""Maps a rank to what its thread does in every round."""


def bare_locks(size: int) -> Meet:
    """A lock for each thread, and a counter to tell who is last."""
    mutex = threading.Lock()
    wakes = [threading.Lock() for _ in range(size)]
    for wake in wakes:
        wake.acquire()
    missing = size

    def meet_as(rank: int) -> Callable[[], None]:
        own, lead, others = wakes[rank], wakes[0], wakes[1:]

        def meet() -> None:
            nonlocal missing
            with mutex:
                missing -= 1
                if missing == 0:
                    lead.release()
            own.acquire()
            if own is lead:
                missing = size
                for wake in others:
                    wake.release()

        return meet

    return meet_as


def echo(messages: Sequence[tuple[int, Any]]) -> Sequence[tuple[int, Any]]:
    """Give everybody what it sent."""
    return messages


def replica_group(size: int) -> Meet:
    """Members of a ReplicaGroup."""
    group = ReplicaGroup(size)

    def meet_as(rank: int) -> Callable[[], object]:
        replica = group.member(rank)
        return lambda: replica.exchange(rank, echo, where="here")

    return meet_as


def sync_master(size: int) -> Meet:
    """A SyncMaster and its slaves."""
    master = SyncMaster(echo)
    pipes = {rank: master.register_slave(rank) for rank in range(1, size)}

    def meet_as(rank: int) -> Callable[[], object]:
        return (lambda: pipes[rank].run_slave(rank)) if rank else (lambda: master.run_master(rank))

    return meet_as


def time_rounds(make: Callable[[int], Meet], size: int) -> float:
    """Seconds per round, once all threads run."""
    meet_as = make(size)

    def run(meet: Callable[[], object]) -> None:
        for _ in range(1 + ROUNDS):
            meet()

    threads = [threading.Thread(target=run, args=(meet_as(rank),)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    meet = meet_as(0)
    meet()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        meet()
    seconds = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return seconds / ROUNDS


def main() -> None:
    """Measure, or collect what child processes have measured."""
    options = options_of(__doc__)
    makers = {"bare locks": bare_locks, "ReplicaGroup": replica_group, "SyncMaster": sync_master}
    if options.part:
        rows: list[Row] = []
        for size in SIZES[:1] if options.quick else SIZES:
            variants = {name: lambda m=make, s=size: time_rounds(m, s) for name, make in makers.items()}
            rows += measure(f"R = {size}", variants, options)
        hand_over(rows)
        return
    rows = under_each_setting(options)
    ours = list(makers)[1:]
    targets = []
    for size in SIZES:
        case = f"R = {size}"
        to_locks = [((case, one), (case, "bare locks")) for one in ours]
        targets.append(Target(f"to bare locks, {case}", 1.3, to_locks))
    # Not from R = 2, which has two speeds: two threads may take turns on one core without waking another.
    growth = [((f"R = {SIZES[-1]}", one), (f"R = {SIZES[1]}", one)) for one in ours]
    targets.append(Target("linear growth from R = 4 to R = 64", SIZES[-1] / SIZES[1], growth))
    bare = [((f"R = {SIZES[-1]}", "bare locks"), (f"R = {SIZES[1]}", "bare locks"))]
    targets.append(Target("the same of bare locks, to compare with", SIZES[-1] / SIZES[1], bare))
    sections = {"Targets": target_table(targets, rows), "Timings": timing_table(rows)}
    save("rounds", options, sections, rows)


if __name__ == "__main__":
    main()
