"""The engine under both SyncMaster and ReplicaGroup: parties that meet, and the first of them combines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NoReturn

from syncbn_comm import _party, _reports
from syncbn_comm._errors import BrokenSyncError, MisuseError, ReplicaLeftError, SyncTimeoutError
from syncbn_comm._party import Party, State

Combine = Callable[[list[tuple[Any, Any]]], Iterable[tuple[Any, Any]]]

# Left in a party's slot, instead of a result, when its round broke.
_BROKEN = object()

# Looked up once: on an enum class that takes longer than the comparison itself.
_RUNNING, _WAITING, _COMBINING, _LEFT = State.RUNNING, State.WAITING, State.COMBINING, State.LEFT


class Rendezvous:
    """Parties that wait for each other at named places, all of them at every place.

    As a round needs everybody, one round at most is under way, and two counters tell after every arrival and
    every departure whether it can still take place: it cannot if anybody has left, or if everybody waits but
    not at one place. Whoever finds that out breaks the rendezvous for all, for good.

    A finished round costs one pass over the parties, made by the *lead*, party 0: the last arrival wakes the
    lead, which combines and wakes each of the others once.

    Args:
        timeout: seconds that one wait may last; None waits for ever.
        name: put in front of error messages.
    """

    def __init__(self, timeout: float | None, name: str | None = None) -> None:
        self.timeout = timeout
        self._lead = Party(0)
        self.parties: dict[Hashable, Party] = {0: self._lead}
        self.calls: dict[str | None, int] = {}  # finished rounds, per place
        self.failure: BaseException | None = None
        self.failed: Any = None  # the identifier of the party that failed, where there is one
        self.name = name
        self._prefix = f"{name}: " if name else ""
        self._report = ""
        self._mutex = _party.new_lock()
        self._patience = -1.0 if timeout is None else timeout  # as a lock wants it
        self._running = 1  # parties that neither wait nor have left
        self._left = 0
        self._where: str | None = None  # where this round's first arrival waits
        self._split = False  # somebody else of this round waits elsewhere

    def join(self, identifier: Hashable) -> Party:
        """Add a party.

        Raises:
            BrokenSyncError: the rendezvous is broken.
            MisuseError: a round is complete and its callback runs.
        """
        with self._mutex:
            if self.failure is not None:
                self._raise_broken()
            if self._lead.state is _COMBINING:
                raise MisuseError(f"expected {identifier!r} before the round, got it during the callback")
            party = self.parties[identifier] = Party(identifier)
            self._running += 1
            return party

    def meet(self, party: Party, message: Any, combine: Combine | None, where: str) -> Any:
        """Wait for everybody at one place; return this party's share of what the lead's ``combine`` answers.

        Of the callbacks that the parties bring, only the lead's is called.

        Raises:
            BrokenSyncError: the rendezvous is broken, or breaks during the wait; one of its subclasses if the
                first failure is of that kind.
            MisuseError: the party has left, or waits already.
        """
        with self._mutex:
            if self.failure is not None:
                self._raise_broken()
            if party.state is not _RUNNING:
                raise MisuseError(self._prefix + _reports.misused(party, where))
            party.state = _WAITING
            party.where = where
            party.slot = message
            self._running -= 1
            if self._where is None:
                self._where = where
            elif where != self._where:
                self._split = True
            if self._left or (self._running == 0 and self._split):
                self._break_stuck()
            elif self._running == 0:
                self._lead.state = _COMBINING
                self._lead.wake.release()
        try:
            if not party.wake.acquire(True, self._patience):
                self._time_out(party)
            if party.slot is _BROKEN:
                self._raise_broken()
            if party is self._lead:
                self._combine(combine, where)
        except BaseException as failure:
            party.slot = None
            self.abort(failure, party)
            raise
        result, party.slot = party.slot, None
        return result

    def enter(self, party: Party) -> None:
        """Begin a ``with`` block of this party.

        Raises:
            MisuseError: the party has left, or another thread is inside a block of it.
        """
        thread = threading.get_ident()
        with self._mutex:
            if party.state is _LEFT or (party.entered and party.thread != thread):
                raise MisuseError(self._prefix + _reports.cannot_enter(party))
            party.entered += 1
            party.thread = thread

    def exit(self, party: Party) -> None:
        """End a ``with`` block of this party; it leaves at the end of the outermost."""
        with self._mutex:
            party.entered = max(0, party.entered - 1)
            if party.entered:
                return
        self.leave(party)

    def leave(self, party: Party) -> None:
        """Say that this party will not come any more."""
        with self._mutex:
            if party.state is _LEFT:
                return
            party.state = _LEFT
            self._running -= 1
            self._left += 1
            somebody_waits = self._running + self._left < len(self.parties)
            if somebody_waits and self.failure is None:
                self._break_stuck()

    def abort(self, failure: BaseException, party: Party | None = None) -> None:
        """Break the rendezvous: everybody who waits, or will wait, raises from the first failure."""
        if not isinstance(failure, BaseException):
            raise MisuseError(f"{self._prefix}expected an exception to abort with, got {failure!r:.200}")
        with self._mutex:
            self._break(failure, party, _reports.failed(failure, party, self.calls))

    def forget_failure(self) -> None:
        """Stay broken, but keep no longer the first failure and the frames in its traceback."""
        with self._mutex:
            if self.failure is not None:
                self.failure = BrokenSyncError(self._report)

    def retire(self, reason: str) -> None:
        """End the use of this rendezvous, broken or not: who waits, or will wait, is told the reason."""
        failure = BrokenSyncError(reason)
        with self._mutex:
            failure.__cause__, self.failure = self.failure, None
            self._break(failure, None, reason)

    @property
    def broken_by(self) -> str | None:
        """What broke the rendezvous, in words; None if it is whole. This takes no lock, so it cannot block."""
        return None if self.failure is None else self._report.removeprefix(self._prefix)

    def _break_stuck(self) -> None:
        parties = self.parties.values()
        if self._left:
            gone = [party for party in parties if party.state is _LEFT]
            report = _reports.left(gone, parties, self.calls)
            self._break(ReplicaLeftError(self._prefix + report), gone[0], report)
        else:
            report = _reports.split(parties, self.calls)
            self._break(BrokenSyncError(self._prefix + report), None, report)

    def _time_out(self, party: Party) -> None:
        with self._mutex:
            # Somebody may have woken it since its time was up.
            if party.state is _WAITING:
                report = _reports.timed_out(party, self.timeout, self.parties.values(), self.calls)
                self._break(SyncTimeoutError(self._prefix + report), None, report)
        party.wake.acquire()

    def _combine(self, combine: Combine | None, where: str) -> None:
        if combine is None:
            raise MisuseError(f"{self._prefix}expected a callback at '{where}' from replica 0, got None")
        parties = self.parties
        # No name for the messages: this frame outlives them.
        results = _results(combine([(party.identifier, party.slot) for party in parties.values()]), parties)
        with self._mutex:
            if self.failure is not None:
                self._raise_broken()
            self.calls[where] = self.calls.get(where, 0) + 1
            self._where = None
            self._running = len(parties)
            for identifier, party in parties.items():
                party.slot = results[identifier]
                party.state = _RUNNING
                if party is not self._lead:
                    party.wake.release()

    def _break(self, failure: BaseException, party: Party | None, report: str) -> None:
        if self.failure is None:
            self.failure = failure
            self.failed = None if party is None else party.identifier
            self._report = self._prefix + report
        # Even where it was broken before: an interrupt may have stopped that before everybody was awake.
        for waiter in self.parties.values():
            if waiter.state is _WAITING:
                waiter.slot = _BROKEN
                waiter.state = _RUNNING
                waiter.wake.release()

    def _raise_broken(self) -> NoReturn:
        for kind in (SyncTimeoutError, ReplicaLeftError):
            if isinstance(self.failure, kind):
                raise kind(self._report) from self.failure
        raise BrokenSyncError(self._report) from self.failure


def _results(answers: Iterable[tuple[Any, Any]], parties: dict[Hashable, Party]) -> dict[Hashable, Any]:
    """Turn the callback's answers into a dict with exactly one result per party, or say what is wrong."""
    try:
        pairs = list(answers)
        results = dict(pairs)
    except (TypeError, ValueError) as error:
        raise MisuseError(
            f"expected the callback to return a list of (identifier, result) pairs, got {answers!r:.200}"
        ) from error
    if len(pairs) != len(parties) or results.keys() != parties.keys():
        raise MisuseError(
            f"expected the callback to answer each of {list(parties)} once, "
            f"got answers for {[identifier for identifier, _ in pairs]}"
        )
    return results
