from __future__ import annotations

import operator

import pytest

from syncbn_comm import BrokenSyncError, ReplicaGroup, SyncError


def run_all(threads, world_size, work):
    return threads.run_members(ReplicaGroup(world_size), *[work] * world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_all_reduce_folds_in_rank_order(threads, world_size):
    whole = "".join(str(rank) for rank in range(world_size))
    assert run_all(threads, world_size, lambda r: r.all_reduce(str(r.rank))) == [whole] * world_size


def test_all_reduce_takes_any_operation(threads):
    assert run_all(threads, 3, lambda r: r.all_reduce(r.rank + 2, operator.pow)) == [(2**3) ** 4] * 3


def test_all_gather_gives_each_replica_a_list_of_its_own(threads):
    lists = run_all(threads, 3, lambda r: r.all_gather(r.rank))
    assert lists == [[0, 1, 2]] * 3
    assert len({id(parts) for parts in lists}) == 3


@pytest.mark.parametrize("src", [0, 1, 2])
def test_broadcast_gives_everybody_the_object_of_the_source(threads, src):
    objects = [object() for _ in range(3)]
    results = run_all(threads, 3, lambda r: r.broadcast(objects[r.rank], src))
    assert all(result is objects[src] for result in results)


def test_replicas_that_disagree_on_the_source_get_an_error(threads):
    outcomes = run_all(threads, 2, lambda r: r.broadcast(1, src=r.rank))
    for outcome in outcomes:
        assert type(outcome) is BrokenSyncError
        assert "replica 0 at 'broadcast from 0' (call 1), replica 1 at 'broadcast from 1'" in str(outcome)


@pytest.mark.parametrize("src", [-1, 2])
def test_a_source_that_does_not_exist_is_an_error(src):
    with pytest.raises(ValueError, match=rf"expected src to be from 0 to 1, got {src}"):
        ReplicaGroup(2).member(0).broadcast(1, src=src)


def test_nobody_passes_a_barrier_before_all_have_arrived(threads):
    before, seen = [], []

    def work(replica):
        before.append(replica.rank)
        replica.barrier()
        seen.append(len(before))

    run_all(threads, 4, work)
    assert seen == [4] * 4


def test_exchange_gives_each_replica_the_result_meant_for_it(threads):
    def combine(messages):
        return [(rank, message * 10 + rank) for rank, message in messages]

    def work(replica):
        return replica.exchange(replica.rank + 1, combine, where="layer")

    assert run_all(threads, 3, work) == [10, 21, 32]


def test_the_callback_of_rank_0_is_the_one_that_counts(threads):
    def work(replica):
        return replica.exchange(None, lambda messages: [(rank, replica.rank) for rank, _ in messages])

    assert run_all(threads, 3, work) == [0, 0, 0]


def test_a_member_is_always_the_same_object():
    group = ReplicaGroup(2)
    replica = group.member(1)
    assert group.member(1) is replica
    assert (replica.rank, replica.group, group.world_size) == (1, group, 2)


def test_a_misuse_is_also_a_sync_error():
    with pytest.raises(SyncError):
        ReplicaGroup(2).member(2)
