"""A replica that will not arrive is found at once: none of these groups has a timeout."""

from __future__ import annotations

import pytest

from syncbn_comm import BrokenSyncError, ReplicaGroup, ReplicaLeftError


def visits(*places):
    def work(replica):
        for place in places:
            replica.barrier(where=place)

    return work


def assert_all_told(outcomes, group, kind, text):
    for outcome in outcomes:
        assert type(outcome) is kind
        assert str(outcome) == text
        assert outcome.__cause__ is group.failure
        assert outcome is not group.failure


def test_a_replica_that_skips_the_second_call_is_named_with_place_and_call(threads, waiting):
    group = ReplicaGroup(4, timeout=None)

    def leaves_late(replica):
        replica.barrier(where="layer3.1.bn2")
        waiting(group, 0, 1, 3)

    stays = visits("layer3.1.bn2", "layer3.1.bn2")
    outcomes = threads.run_members(group, stays, stays, leaves_late, stays)
    assert outcomes.pop(2) is None
    text = "replica 2 finished without reaching 'layer3.1.bn2' (call 2); replicas 0, 1, 3 are waiting"
    assert_all_told(outcomes, group, ReplicaLeftError, text)
    assert group.failed_rank == 2


def test_calls_of_one_place_are_counted(threads):
    group = ReplicaGroup(2, timeout=None)
    outcomes = threads.run_members(group, visits("a", "b", "a", "a"), visits("a", "b", "a"))
    text = "replica 1 finished without reaching 'a' (call 3); replica 0 is waiting"
    assert_all_told(outcomes[:1], group, ReplicaLeftError, text)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("culprit", ["master", "first", "last"])
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_replica_that_stops_early_is_an_error_for_all_others(threads, world_size, culprit, skipped):
    rank = {"master": 0, "first": 1, "last": world_size - 1}[culprit]
    works = [visits("first", "middle", "last")] * world_size
    works[rank] = visits(*("first", "middle", "last")[:skipped])
    group = ReplicaGroup(world_size, timeout=None)
    outcomes = threads.run_members(group, *works)
    assert outcomes.pop(rank) is None
    for outcome in outcomes:
        assert type(outcome) is ReplicaLeftError
        assert outcome.__cause__ is group.failure
        assert "without reaching" in str(outcome)
        assert repr(("first", "middle", "last")[skipped]) in str(outcome)
    assert group.failed_rank == rank


def test_a_replica_that_arrives_after_the_departure_gets_an_error_at_once():
    group = ReplicaGroup(2, timeout=None)
    with group.member(1):
        pass
    with pytest.raises(ReplicaLeftError) as caught:
        group.member(0).barrier(where="a")
    text = "replica 1 finished without reaching 'a' (call 1); replica 0 is waiting"
    assert_all_told([caught.value], group, ReplicaLeftError, text)


def test_several_departures_are_all_named():
    group = ReplicaGroup(3, timeout=None)
    for rank in (0, 2):
        with group.member(rank):
            pass
    with pytest.raises(ReplicaLeftError, match=r"^replicas 0, 2 finished without reaching 'a'"):
        group.member(1).barrier(where="a")


def test_replicas_that_all_leave_break_nothing(threads):
    group = ReplicaGroup(2)
    replica = group.member(0)
    assert not replica.finished
    threads.run_members(group, visits("a"), visits("a"))
    assert replica.finished
    assert not group.broken
    assert (group.failure, group.failed_rank) == (None, None)


def test_two_replicas_that_wait_at_two_places_get_an_error(threads):
    group = ReplicaGroup(3, timeout=None)
    outcomes = threads.run_members(group, visits("a", "b"), visits("a", "c"), visits("a", "b"))
    text = (
        "all replicas that still run are waiting, but at different places: "
        "replicas 0, 2 at 'b' (call 1), replica 1 at 'c' (call 1)"
    )
    assert_all_told(outcomes, group, BrokenSyncError, text)
    assert group.failed_rank is None


def test_a_departure_while_others_wait_at_different_places_lists_them(threads, waiting):
    group = ReplicaGroup(3, timeout=None)
    outcomes = threads.run_members(group, visits("a"), visits("b"), lambda replica: waiting(group, 0, 1))
    assert outcomes.pop(2) is None
    text = "replica 2 finished while others wait: replica 0 at 'a' (call 1), replica 1 at 'b' (call 1)"
    assert_all_told(outcomes, group, ReplicaLeftError, text)


def test_messages_begin_with_the_name_of_the_group():
    group = ReplicaGroup(2, timeout=None, name="focal-loss")
    with group.member(1):
        pass
    with pytest.raises(ReplicaLeftError, match=r"^focal-loss: replica 1 finished without reaching 'all_red"):
        group.member(0).all_reduce(1)
