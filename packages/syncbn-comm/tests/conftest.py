"""Shared by all test files of this package: threads that are shown to end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from syncbn_comm import ReplicaGroup
from syncbn_comm._participant import State

# Much longer than anything here takes. A thread that runs longer hangs.
HANG_SECONDS = 30.0


class Threads:
    """Runs each callable in a thread, and returns what it returned or raised."""

    def __init__(self) -> None:
        self.started: list[threading.Thread] = []

    def start(self, *works: Callable[[], Any]) -> Callable[..., list[Any]]:
        """Start the works. The returned function joins their threads and returns the outcomes, in order."""
        outcomes: list[Any] = [None] * len(works)

        def run(index: int) -> None:
            try:
                outcomes[index] = works[index]()
            except BaseException as exc:  # also an outcome
                outcomes[index] = exc

        threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
        self.started += threads
        for thread in threads:
            thread.start()

        def join(within: float = HANG_SECONDS) -> list[Any]:
            self.join(threads, within)
            return outcomes

        return join

    def run(self, *works: Callable[[], Any]) -> list[Any]:
        """Start the works and wait for all of them."""
        return self.start(*works)()

    def run_members(self, group: ReplicaGroup, *works: Callable[[Any], Any]) -> list[Any]:
        """Run ``works[rank](replica)`` inside ``with group.member(rank)``, for every rank."""

        def member(rank: int) -> Any:
            with group.member(rank) as replica:
                return works[rank](replica)

        return self.run(*(lambda rank=rank: member(rank) for rank in range(len(works))))

    @staticmethod
    def join(threads: Sequence[threading.Thread], within: float = HANG_SECONDS) -> None:
        deadline = time.monotonic() + within
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hung = [thread.name for thread in threads if thread.is_alive()]
        assert not hung, f"threads hang: {hung}"


@pytest.fixture
def threads() -> Any:
    """Start threads, all of which have to end before the test does."""
    started = Threads()
    yield started
    started.join(started.started)


def until_waiting(of: Any, *identifiers: Any, rounds: int = 0) -> None:
    """Return when that many rounds are complete and these participants of a group or a master wait."""
    rendezvous = of._rendezvous if isinstance(of, ReplicaGroup) else of._set
    deadline = time.monotonic() + HANG_SECONDS
    while sum(rendezvous.calls.values()) < rounds or any(
        rendezvous.participants[key].state is not State.WAITING for key in identifiers
    ):
        assert time.monotonic() < deadline, f"{identifiers} never came to wait"
        os.sched_yield()


@pytest.fixture
def waiting() -> Any:
    """`until_waiting`, as a fixture because test files cannot import from here."""
    return until_waiting
