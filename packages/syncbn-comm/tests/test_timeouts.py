from __future__ import annotations

import threading

import pytest

from syncbn_comm import FutureResult, ReplicaGroup, SyncError, SyncMaster, SyncTimeoutError

SHORT = 0.01


class ImpatientWake:
    """A wake-up call whose first wait ends by the time limit as soon as the others wait."""

    def __init__(self, wake, others_wait):
        self.wake, self.others_wait = wake, others_wait
        self.release = wake.release

    def acquire(self, *args):
        if self.others_wait is None:
            return self.wake.acquire(*args)
        self.others_wait()
        self.others_wait = None
        return False


def test_a_timeout_says_who_arrived_and_who_is_missing(threads, waiting):
    master = SyncMaster(list, timeout=30, name="layer1.0.bn1")
    pipes = [master.register_slave(rank) for rank in (1, 2, 3)]
    lead = master._set.participants[0]
    lead.wake = ImpatientWake(lead.wake, lambda: waiting(master, 1, 3))
    outcomes = threads.run(
        lambda: master.run_master(0), lambda: pipes[0].run_slave(1), lambda: pipes[2].run_slave(3)
    )
    failure = master._set.failure
    assert isinstance(failure, TimeoutError)
    for outcome in outcomes:
        assert type(outcome) is SyncTimeoutError
        assert outcome.__cause__ is failure
        assert str(outcome) == (
            "timed out after 30.0 s at 'layer1.0.bn1': 3 of 4 replicas arrived (missing: 2); "
            "replica 2 has not synchronized yet"
        )


def test_a_timeout_tells_where_the_missing_replicas_are(threads, waiting):
    group = ReplicaGroup(4, timeout=300)
    threads.run(*(lambda r=rank: group.member(r).barrier(where="bn0") for rank in range(4)))
    lead = group._rendezvous.participants[0]
    lead.wake = ImpatientWake(lead.wake, lambda: waiting(group, 1))
    outcomes = threads.run(
        lambda: group.member(0).barrier(where="bn1"), lambda: group.member(1).barrier(where="elsewhere")
    )
    for outcome in outcomes:
        assert str(outcome) == (
            "timed out after 300.0 s at 'bn1': 1 of 4 replicas arrived (missing: 1, 2, 3); "
            "replica 1 waits at 'elsewhere' (call 1); "
            "replica 2 was last at 'bn0' (call 1); replica 3 was last at 'bn0' (call 1)"
        )


def test_a_late_replica_gets_the_error_at_once():
    group = ReplicaGroup(2, timeout=SHORT)
    with pytest.raises(SyncTimeoutError):
        group.member(0).barrier()
    with pytest.raises(SyncTimeoutError, match=r"timed out after 0\.01 s at 'barrier'") as caught:
        group.member(1).barrier()
    assert caught.value.__cause__ is group.failure


def test_a_callback_that_takes_too_long_is_reported(threads):
    proceed = threading.Event()
    group = ReplicaGroup(2, timeout=SHORT)

    def slow(messages):
        proceed.wait(10)
        return messages

    of_zero = threads.start(lambda: group.member(0).exchange(None, slow, where="bn1"))
    with pytest.raises(SyncTimeoutError, match="2 of 2 replicas arrived, but the combine callback has not"):
        group.member(1).exchange(None, slow, where="bn1")
    proceed.set()
    assert type(of_zero()[0]) is SyncTimeoutError


def test_a_timeout_that_comes_just_after_the_wake_up_changes_nothing(threads):
    """The lock says that the time is up, but the result has been handed over meanwhile."""
    group = ReplicaGroup(2)
    participant = group._rendezvous.participants[1]

    def handed_over():
        assert participant.wake.wake.acquire(timeout=30)
        participant.wake.wake.release()

    participant.wake = ImpatientWake(participant.wake, handed_over)
    assert threads.run(*(lambda r=rank: group.member(r).all_reduce(1) for rank in range(2))) == [2, 2]
    assert not group.broken


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SYNCBN_TIMEOUT", "7")
    assert ReplicaGroup(1, timeout=2).timeout == 2.0
    assert ReplicaGroup(1, timeout=None).timeout is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("12.5", 12.5), (" 3 ", 3.0), ("none", None), ("None", None), ("", 300.0)]
)
def test_the_environment_is_read_at_construction(monkeypatch, text, seconds):
    monkeypatch.setenv("SYNCBN_TIMEOUT", text)
    assert ReplicaGroup(1).timeout == seconds
    assert SyncMaster(list)._timeout == seconds


def test_the_default_is_five_minutes(monkeypatch):
    monkeypatch.delenv("SYNCBN_TIMEOUT", raising=False)
    assert ReplicaGroup(1).timeout == 300.0
    assert ReplicaGroup(1, timeout=...).timeout == 300.0


@pytest.mark.parametrize("text", ["soon", "-1", "0", "nan", "inf"])
def test_an_invalid_value_in_the_environment_is_a_clear_error(monkeypatch, text):
    monkeypatch.setenv("SYNCBN_TIMEOUT", text)
    for construct in (lambda: ReplicaGroup(1), lambda: SyncMaster(list), lambda: FutureResult().get()):
        with pytest.raises(SyncError, match=f"expected SYNCBN_TIMEOUT to be a positive .* got '{text}'"):
            construct()


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "soon", [], 1e12])
def test_an_invalid_argument_is_a_clear_error(timeout):
    with pytest.raises(ValueError, match="expected timeout to be a positive number of seconds"):
        ReplicaGroup(1, timeout=timeout)
