"""A participant of a rendezvous: what it does, and the message or result that it carries."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import Any

from syncbn_comm import _locks


class State(enum.Enum):
    """What a participant is doing."""

    RUNNING = enum.auto()
    WAITING = enum.auto()
    COMBINING = enum.auto()
    LEFT = enum.auto()


class Participant:
    """One participant of a rendezvous; its fields change only under the mutex of the rendezvous.

    Attributes:
        identifier: the label of its messages.
        state: what it is doing.
        where: the place where it waits, or where it was last; None before its first round.
        slot: its message until the round is complete, then its result until it fetches that, else None.
            There is one slot, so neither a message nor a result can outlive the round.
        wake: a binary semaphore. It is held until there is a reason to wake the participant.
        entered: how many of its ``with`` blocks are open. All of them belong to one thread.
        thread: the identifier of that thread.
    """

    __slots__ = ("entered", "identifier", "slot", "state", "thread", "wake", "where")

    def __init__(self, identifier: Hashable) -> None:
        self.identifier = identifier
        self.state = State.RUNNING
        self.where: str | None = None
        self.slot: Any = None
        self.entered = 0
        self.thread = 0
        self.wake = _locks.new_lock()
        self.wake.acquire()
