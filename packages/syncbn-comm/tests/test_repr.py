"""What a debugger shows: name, size, who is active, who has left, what broke."""

from __future__ import annotations

from syncbn_comm import ReplicaGroup, SyncMaster


def test_a_group_shows_its_name_and_size():
    assert repr(ReplicaGroup(4, name="focal-loss")) == "<ReplicaGroup 'focal-loss', 4 replicas>"
    assert repr(ReplicaGroup(1)) == "<ReplicaGroup, 1 replica>"


def test_a_group_shows_who_is_active_who_has_left_and_what_broke():
    group = ReplicaGroup(4, name="focal-loss")
    with group.member(3), group.member(1):
        with group.member(2), group.member(0):
            pass
        assert repr(group) == "<ReplicaGroup 'focal-loss', 4 replicas; active: 1, 3; left: 0, 2>"
        group.abort(ValueError("boom"), rank=1)
    assert repr(group) == (
        "<ReplicaGroup 'focal-loss', 4 replicas; left: 0, 1, 2, 3; "
        "broken: replica 1 failed before it synchronized for the first time: ValueError: boom>"
    )


def test_a_member_shows_its_rank_its_group_and_what_it_does(threads, waiting):
    group = ReplicaGroup(2, timeout=None, name="focal-loss")
    zero, one = group.member(0), group.member(1)
    assert repr(one) == "<Replica 1 (of 0 to 1) of 'focal-loss', running>"
    join = threads.start(lambda: one.barrier(where="bn1"))
    waiting(group, 1)
    assert repr(one) == "<Replica 1 (of 0 to 1) of 'focal-loss', waiting at 'bn1' (call 1)>"
    seen = []

    def combine(messages):
        seen.append(repr(zero))
        return messages

    zero.exchange(None, combine, where="bn1")
    join()
    assert seen == ["<Replica 0 (of 0 to 1) of 'focal-loss', combining at 'bn1' (call 1)>"]
    with one:
        pass
    assert repr(one) == "<Replica 1 (of 0 to 1) of 'focal-loss', left>"
    kept = ReplicaGroup(1)
    assert repr(kept.member(0)) == "<Replica 0 (of 0 to 0), running>"


def test_a_master_shows_its_name_its_slaves_and_what_broke():
    master = SyncMaster(list, name="layer1.bn1")
    assert repr(master) == "<SyncMaster 'layer1.bn1', 0 slaves>"
    pipe = master.register_slave(1)
    assert repr(master) == "<SyncMaster 'layer1.bn1', 1 slave: 1>"
    assert repr(pipe) == "<SlavePipe 1 of 'layer1.bn1'>"
    master.register_slave("left")
    master.abort(ValueError("boom"))
    assert repr(master) == ("<SyncMaster 'layer1.bn1', 2 slaves: 1, left; broken: aborted: ValueError: boom>")
    assert repr(SyncMaster(list)) == "<SyncMaster, 0 slaves>"


def test_a_group_can_be_shown_while_its_lock_is_held():
    """As in a debugger that has stopped inside of a round."""
    group = ReplicaGroup(2)
    with group._rendezvous._mutex:
        assert repr(group) == "<ReplicaGroup, 2 replicas>"
        assert group.active_ranks == []
