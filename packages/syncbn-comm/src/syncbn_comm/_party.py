"""One taker of part in a rendezvous, and the words for what it does."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Hashable
from typing import Any

# Every lock of the package comes from here, so that a test can put in locks whose schedule it controls.
new_lock: Callable[[], threading.Lock] = threading.Lock


class State(enum.Enum):
    """What a party does at the moment."""

    RUNNING = enum.auto()
    WAITING = enum.auto()
    COMBINING = enum.auto()
    LEFT = enum.auto()


class Party:
    """A party's place in a rendezvous; its fields change only under the mutex of the rendezvous.

    Attributes:
        identifier: what its messages are labelled with.
        where: the place it waits at, or was last at; None before its first.
        slot: the message on its way in, the result on its way out, None in between. There is one slot, so
            that neither can outlive its round.
        wake: a binary semaphore: held while there is nothing to wake up for.
        entered: how many ``with`` blocks of it are open, all of them in one thread.
        thread: the thread that entered the blocks.
    """

    __slots__ = ("entered", "identifier", "slot", "state", "thread", "wake", "where")

    def __init__(self, identifier: Hashable) -> None:
        self.identifier = identifier
        self.state = State.RUNNING
        self.where: str | None = None
        self.slot: Any = None
        self.entered = 0
        self.thread = 0
        self.wake = new_lock()
        self.wake.acquire()
