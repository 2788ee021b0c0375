"""How typed code calls syncbn_comm; mypy --strict reads it, nothing runs it but its own test."""

from __future__ import annotations

import operator
from typing import assert_type

from syncbn_comm import (
    BrokenSyncError,
    FutureResult,
    Replica,
    ReplicaGroup,
    SlavePipe,
    SyncMaster,
    current_replica,
)


def use_a_group() -> None:
    group = ReplicaGroup(world_size=1, timeout=None, name="typed")
    with group.member(0) as replica:
        assert_type(replica.all_reduce(1.5, op=operator.mul, where="bn1"), float)
        assert_type(replica.all_gather("a"), list[str])
        assert_type(replica.broadcast(b"x", src=0), bytes)
        assert_type(replica.exchange(2, halves, where="bn2"), float)
        replica.barrier()
        assert_type(current_replica(), Replica | None)
        assert_type(group.active_ranks, list[int])
    assert_type(group.failure, BaseException | None)
    assert_type(group.failed_rank, int | None)
    assert_type(replica.finished, bool)


def halves(messages: list[tuple[int, int]]) -> list[tuple[int, float]]:
    return [(rank, message / 2) for rank, message in messages]


def use_a_master() -> None:
    master = SyncMaster(master_callback=halves, timeout=2, name="typed")
    pipe: SlavePipe = master.register_slave(1)
    assert_type(master.nr_slaves, int)
    SyncMaster(halves).run_master(master_msg=1)
    master.abort(ValueError("enough"))
    try:
        pipe.run_slave(1)
    except BrokenSyncError:
        master.reset()
    SyncMaster(halves, timeout=...)


def use_a_future() -> None:
    future: FutureResult[int] = FutureResult()
    future.put(1)
    assert_type(future.get(timeout=...), int)


if __name__ == "__main__":
    use_a_group()
    use_a_master()
    use_a_future()
