"""A thread knows which member's ``with`` block it is inside, and a group knows whose blocks are open."""

from __future__ import annotations

import gc
import weakref

import pytest

from syncbn_comm import ReplicaGroup, SyncError, current_replica


def test_outside_of_any_block_there_is_no_current_replica():
    assert current_replica() is None


def test_inside_a_block_the_member_is_the_current_replica():
    group = ReplicaGroup(2)
    with group.member(1) as replica:
        assert current_replica() is replica
    assert current_replica() is None


def test_each_thread_has_a_current_replica_of_its_own(threads):
    group = ReplicaGroup(4)

    def work(replica):
        replica.barrier()  # all four blocks are open
        return current_replica().rank

    assert threads.run_members(group, *[work] * 4) == [0, 1, 2, 3]


def test_a_thread_that_is_started_inside_a_block_is_outside_of_it(threads):
    with ReplicaGroup(1).member(0):
        assert threads.run(current_replica) == [None]


def test_the_innermost_of_nested_blocks_counts():
    outer, inner = ReplicaGroup(2).member(1), ReplicaGroup(3).member(2)
    seen = []
    with outer:
        with inner:
            seen.append(current_replica())
        seen.append(current_replica())
    assert seen == [inner, outer]
    assert current_replica() is None


def test_a_block_that_ends_by_an_exception_is_left_as_well():
    group = ReplicaGroup(2)
    with pytest.raises(KeyError), group.member(0):
        raise KeyError
    assert current_replica() is None
    assert group.active_ranks == []


def test_the_active_ranks_are_those_whose_blocks_are_open(threads):
    group = ReplicaGroup(3)

    def work(replica):
        seen = replica.all_gather(None) and group.active_ranks
        replica.barrier()
        return seen

    assert group.active_ranks == []
    assert threads.run_members(group, *[work] * 3) == [[0, 1, 2]] * 3
    assert group.active_ranks == []
    group = ReplicaGroup(3)
    with group.member(2):
        assert group.active_ranks == [2]
        with group.member(0):
            assert group.active_ranks == [0, 2]
        assert group.active_ranks == [2]


def test_a_member_that_is_used_without_a_block_is_not_active():
    group = ReplicaGroup(1)
    group.member(0).barrier()
    assert group.active_ranks == []


def test_a_broken_group_still_says_whose_blocks_are_open():
    group = ReplicaGroup(2)
    with group.member(1):
        group.abort(RuntimeError())
        assert group.active_ranks == [1]
    assert group.active_ranks == []


def test_a_thread_may_enter_its_member_again_and_leaves_it_with_the_outermost_block():
    group = ReplicaGroup(2)
    with group.member(1) as replica:
        with ReplicaGroup(1).member(0) as other:
            with replica:
                assert current_replica() is replica
            assert current_replica() is other
        assert current_replica() is replica
        assert not replica.finished
        assert group.active_ranks == [1]
    assert replica.finished
    assert group.active_ranks == []


def test_another_thread_cannot_enter_a_member_whose_block_is_open(threads):
    group = ReplicaGroup(2, name="focal-loss")
    with group.member(1) as replica:
        (outcome,) = threads.run(replica.__enter__)
        assert isinstance(outcome, SyncError)
        assert (
            str(outcome) == "focal-loss: expected a replica that no other thread has entered, got replica 1"
        )
        assert group.active_ranks == [1]
    assert not group.broken


def test_a_generator_whose_blocks_end_in_another_order_leaves_the_right_ones():
    def inside(replica):
        with replica:
            yield

    first, second = ReplicaGroup(2).member(0), ReplicaGroup(2).member(1)
    blocks = [inside(first), inside(second)]
    for block in blocks:
        next(block)
    blocks[0].close()
    assert current_replica() is second
    blocks[1].close()
    assert current_replica() is None


def test_a_block_that_ends_in_another_thread_is_left_in_the_thread_that_entered(threads):
    replica = ReplicaGroup(1).member(0)
    replica.__enter__()
    assert threads.run(lambda: replica.__exit__(None, None, None)) == [None]
    assert current_replica() is None
    assert replica.finished


def test_a_block_that_never_ends_does_not_keep_its_group():
    group = ReplicaGroup(1)
    group.member(0).__enter__()
    watched = weakref.ref(group)
    del group
    gc.collect()
    assert watched() is None
    assert current_replica() is None


def test_to_leave_without_having_entered_says_that_the_replica_is_done():
    group = ReplicaGroup(2)
    group.member(1).__exit__(None, None, None)
    assert group.member(1).finished
