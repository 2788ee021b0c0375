"""The engine of SyncMaster and ReplicaGroup: participants wait for each other, and the first one combines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NoReturn

from syncbn_comm import _error_messages, _locks
from syncbn_comm._errors import BrokenSyncError, MisuseError, ReplicaLeftError, SyncTimeoutError
from syncbn_comm._participant import Participant, State

Combine = Callable[[list[tuple[Any, Any]]], Iterable[tuple[Any, Any]]]

# Put in a participant's slot, instead of a result, when its round broke.
_BROKEN = object()

# Looked up once: an attribute of an enum class takes longer to read than the comparison itself.
_RUNNING, _WAITING, _COMBINING, _LEFT = State.RUNNING, State.WAITING, State.COMBINING, State.LEFT


class Rendezvous:
    """Participants that wait for each other at named places, all of them at every place.

    A round needs everybody, so at most one round is under way. After every arrival and every departure two
    counters tell whether the round can still take place. It cannot if somebody has left, or if everybody
    waits but not at the same place. Whoever finds that out breaks the rendezvous for all, permanently.

    A round costs one pass over the participants. The *lead*, participant 0, makes it: the last arrival wakes
    the lead, and the lead combines the messages and wakes each of the others once.

    Args:
        timeout: seconds that one wait may last; None waits forever.
        name: put in front of error messages.
    """

    def __init__(self, timeout: float | None, name: str | None = None) -> None:
        self.timeout = timeout
        self.name = name
        self._lead = Participant(0)
        self.participants: dict[Hashable, Participant] = {0: self._lead}
        self.calls: dict[str | None, int] = {}  # complete rounds, per place
        self.failure: BaseException | None = None
        self.failed: Any = None  # the identifier of the participant that failed, if it was one of them
        self._prefix = f"{name}: " if name else ""
        self._report = ""
        self._mutex = _locks.new_lock()
        self._patience = -1.0 if timeout is None else timeout  # in the form that a lock takes
        self._running = 1  # participants that neither wait nor have left
        self._left = 0
        self._where: str | None = None  # where the first arrival of this round waits
        self._split = False  # another arrival of this round waits elsewhere

    def join(self, identifier: Hashable) -> Participant:
        """Add a participant.

        Raises:
            BrokenSyncError: the rendezvous is broken.
            MisuseError: a round is complete and its callback runs.
        """
        with self._mutex:
            if self.failure is not None:
                self._raise_broken()
            if self._lead.state is _COMBINING:
                raise MisuseError(_error_messages.too_late(identifier, self.participants.values()))
            participant = self.participants[identifier] = Participant(identifier)
            self._running += 1
            return participant

    def meet(self, participant: Participant, message: Any, combine: Combine | None, where: str) -> Any:
        """Wait for everybody at one place, and return this participant's result.

        Each participant brings a callback; only the lead's is called.

        Raises:
            BrokenSyncError: the rendezvous is broken, or breaks during the wait; one of its subclasses if the
                first failure is of that kind.
            MisuseError: the participant has left, or waits already.
        """
        with self._mutex:
            if self.failure is not None:
                self._raise_broken()
            if participant.state is not _RUNNING:
                raise MisuseError(self._prefix + _error_messages.misused(participant, where))
            participant.state = _WAITING
            participant.where = where
            participant.slot = message
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
            if not participant.wake.acquire(True, self._patience):
                self._time_out(participant)
            if participant.slot is _BROKEN:
                self._raise_broken()
            if participant is self._lead:
                self._combine(combine, where)
        except BaseException as failure:
            participant.slot = None
            self.abort(failure, participant)
            raise
        result, participant.slot = participant.slot, None
        return result

    def enter(self, participant: Participant) -> None:
        """Begin a ``with`` block of this participant.

        Raises:
            MisuseError: the participant has left, or another thread is inside a block of it.
        """
        thread = threading.get_ident()
        with self._mutex:
            entered_elsewhere = participant.entered and participant.thread != thread
            if participant.state is _LEFT or entered_elsewhere:
                raise MisuseError(self._prefix + _error_messages.cannot_enter(participant))
            participant.entered += 1
            participant.thread = thread

    def exit(self, participant: Participant) -> None:
        """End a ``with`` block of this participant; it leaves at the end of the outermost block."""
        with self._mutex:
            participant.entered = max(0, participant.entered - 1)
            if participant.entered:
                return
        self.leave(participant)

    def leave(self, participant: Participant) -> None:
        """Say that this participant will take part in no further round."""
        with self._mutex:
            if participant.state is _LEFT:
                return
            participant.state = _LEFT
            self._running -= 1
            self._left += 1
            somebody_waits = self._running + self._left < len(self.participants)
            if somebody_waits and self.failure is None:
                self._break_stuck()

    def abort(self, failure: BaseException, participant: Participant | None = None) -> None:
        """Break the rendezvous: everybody who waits, or will wait, raises from the first failure."""
        if not isinstance(failure, BaseException):
            raise MisuseError(f"{self._prefix}expected an exception to abort with, got {failure!r:.200}")
        with self._mutex:
            self._break(failure, participant, _error_messages.failed(failure, participant, self.calls))

    def forget_failure(self) -> None:
        """Release the first failure and the frames in its traceback; the rendezvous stays broken."""
        with self._mutex:
            if self.failure is not None:
                self.failure = BrokenSyncError(self._report)

    def retire(self, reason: str) -> None:
        """Break this rendezvous, broken already or not: whoever waits, or will wait, gets the reason."""
        with self._mutex:
            self._retire(reason)

    def retire_idle(self, reason: str, newcomer: Hashable) -> None:
        """Break this rendezvous to make room for a new one, unless a round is under way.

        Raises:
            MisuseError: somebody waits or combines, so ``newcomer`` comes too late.
        """
        with self._mutex:
            participants = self.participants.values()
            if any(participant.state in (_WAITING, _COMBINING) for participant in participants):
                raise MisuseError(_error_messages.too_late(newcomer, participants))
            self._retire(reason)

    @property
    def broken_by(self) -> str | None:
        """What broke the rendezvous, in words; None if nothing did. It takes no lock, so it cannot block."""
        return None if self.failure is None else self._report.removeprefix(self._prefix)

    def _retire(self, reason: str) -> None:
        failure = BrokenSyncError(reason)
        failure.__cause__, self.failure = self.failure, None
        self._break(failure, None, reason)

    def _break_stuck(self) -> None:
        participants = self.participants.values()
        if self._left:
            gone = [participant for participant in participants if participant.state is _LEFT]
            report = _error_messages.left(gone, participants, self.calls)
            self._break(ReplicaLeftError(self._prefix + report), gone[0], report)
        else:
            report = _error_messages.split(participants, self.calls)
            self._break(BrokenSyncError(self._prefix + report), None, report)

    def _time_out(self, participant: Participant) -> None:
        with self._mutex:
            # Another thread may have woken it since its time was up.
            if participant.state is _WAITING:
                participants = self.participants.values()
                report = _error_messages.timed_out(participant, self.timeout, participants, self.calls)
                self._break(SyncTimeoutError(self._prefix + report), None, report)
        participant.wake.acquire()

    def _combine(self, combine: Combine | None, where: str) -> None:
        if combine is None:
            raise MisuseError(f"{self._prefix}expected a callback at '{where}' from replica 0, got None")
        participants = self.participants
        # The messages get no name here: this frame outlives them.
        results = _results(
            combine([(participant.identifier, participant.slot) for participant in participants.values()]),
            participants,
        )
        with self._mutex:
            if self.failure is not None:
                self._raise_broken()
            self.calls[where] = self.calls.get(where, 0) + 1
            self._where = None
            self._running = len(participants)
            for identifier, participant in participants.items():
                participant.slot = results[identifier]
                participant.state = _RUNNING
                if participant is not self._lead:
                    participant.wake.release()

    def _break(self, failure: BaseException, participant: Participant | None, report: str) -> None:
        if self.failure is None:
            self.failure = failure
            self.failed = None if participant is None else participant.identifier
            self._report = self._prefix + report
        # Also if it was broken before: an interrupt may have stopped that call before it woke everybody.
        for waiter in self.participants.values():
            if waiter.state is _WAITING:
                waiter.slot = _BROKEN
                waiter.state = _RUNNING
                waiter.wake.release()

    def _raise_broken(self) -> NoReturn:
        for kind in (SyncTimeoutError, ReplicaLeftError):
            if isinstance(self.failure, kind):
                raise kind(self._report) from self.failure
        raise BrokenSyncError(self._report) from self.failure


def _results(
    answers: Iterable[tuple[Any, Any]], participants: dict[Hashable, Participant]
) -> dict[Hashable, Any]:
    """Return the callback's answers as a dict with exactly one result per participant.

    Raises:
        MisuseError: the answers are not pairs, or not one for each participant.
    """
    try:
        pairs = list(answers)
        results = dict(pairs)
    except (TypeError, ValueError) as error:
        raise MisuseError(
            f"expected the callback to return a list of (identifier, result) pairs, got {answers!r:.200}"
        ) from error
    if len(pairs) != len(participants) or results.keys() != participants.keys():
        raise MisuseError(
            f"expected the callback to answer each of {list(participants)} once, "
            f"got answers for {[identifier for identifier, _ in pairs]}"
        )
    return results
