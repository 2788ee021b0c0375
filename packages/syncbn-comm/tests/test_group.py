from __future__ import annotations

from syncbn_comm import BrokenSyncError, ReplicaGroup, ReplicaLeftError


def test_collectives_agree_with_what_the_ranks_brought(threads):
    def work(replica):
        replica.barrier()
        return replica.all_gather(str(replica.rank)), replica.all_reduce(str(replica.rank))

    group = ReplicaGroup(3)
    assert threads.run_members(group, work, work, work) == [(["0", "1", "2"], "012")] * 3


def test_a_replica_that_leaves_while_others_wait_is_an_error_at_once(threads):
    group = ReplicaGroup(4, timeout=None)

    def reach(replica):
        replica.barrier(where="layer3.1.bn2")
        if replica.rank != 2:
            replica.barrier(where="layer3.1.bn2")

    outcomes = threads.run_members(group, reach, reach, reach, reach)
    assert outcomes[2] is None
    for outcome in outcomes[:2] + outcomes[3:]:
        assert isinstance(outcome, ReplicaLeftError)
        assert outcome.__cause__ is group.failure
    assert group.failed_rank == 2


def test_the_failure_of_a_member_reaches_everybody(threads):
    boom = ValueError("boom")

    def fail(replica):
        raise boom

    group = ReplicaGroup(3, timeout=None)
    outcomes = threads.run_members(group, lambda r: r.barrier(), fail, lambda r: r.barrier())
    assert outcomes[1] is boom is group.failure
    for rank in (0, 2):
        assert type(outcomes[rank]) is BrokenSyncError
        assert outcomes[rank].__cause__ is boom
        assert str(outcomes[rank]) == "replica 1 failed before its first rendezvous: ValueError: boom"


def test_replicas_that_wait_at_different_places_are_told_so(threads):
    group = ReplicaGroup(2, timeout=None)
    outcomes = threads.run_members(group, lambda r: r.barrier(where="a"), lambda r: r.barrier(where="b"))
    for outcome in outcomes:
        assert type(outcome) is BrokenSyncError
        assert str(outcome) == (
            "all replicas that still run are waiting, but at different places: "
            "replica 0 at 'a' (call 1), replica 1 at 'b' (call 1)"
        )
