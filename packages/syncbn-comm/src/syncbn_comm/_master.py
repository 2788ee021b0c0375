"""The master and its slaves: one callback answers all of them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from syncbn_comm import _party, _reports
from syncbn_comm._errors import MisuseError
from syncbn_comm._party import Party
from syncbn_comm._rendezvous import Combine, Rendezvous
from syncbn_comm._timeout import Timeout, resolve_timeout


class SlavePipe:
    """A slave's end of a `SyncMaster`; `SyncMaster.register_slave` makes it."""

    def __init__(self, rendezvous: Rendezvous, party: Party, where: str) -> None:
        self._rendezvous = rendezvous
        self._party = party
        self._where = where

    @property
    def identifier(self) -> Hashable:
        """What the slave registered as."""
        return self._party.identifier

    def __repr__(self) -> str:
        return f"<SlavePipe {self._party.identifier!r} of '{self._where}'>"

    def run_slave(self, msg: Any) -> Any:
        """Post a message and wait for the result that the master's callback has for this slave.

        Args:
            msg: any object.

        Returns:
            This slave's result.

        Raises:
            BrokenSyncError: the round broke, or this pipe's set has been forgotten; ``__cause__`` is the
                first failure.
            SyncTimeoutError: the time-out passed, here or for somebody else.
        """
        return self._rendezvous.meet(self._party, msg, None, self._where)


class SyncMaster:
    """A master that collects a message from every slave, and answers each through one callback.

    Register the slaves, then let every thread make its call: `run_master` in one, `SlavePipe.run_slave` in
    each of the others. When all have called, the callback runs once, in the master's thread.

    **Guarantees**

    - The callback sees the messages in the order of registration, the master's first, whatever the order of
      arrival.
    - A set of slaves can be used for any number of rounds, and rounds never mix: a fast slave may post its
      next message before a slow one has fetched its last result.
    - One failure breaks the round for everybody at once: a callback that raises, an `abort`, a time-out, an
      interrupted wait. Each one that waits, or calls later, raises a `BrokenSyncError` of its own, whose
      ``__cause__`` is the first failure. The master stays broken until `reset`.
    - Every method may be called from any thread; one pipe is for one thread at a time.
    - No message or result is kept after its round. Pickles and copies carry the callback, the time-out and
      the name, and no slaves.

    Args:
        callback: called with ``[(0, master's message), (identifier, message), ...]``; returns ``[(0, master's
            result), (identifier, result), ...]``, an answer for each of them.
        timeout: seconds that one wait may last; None waits for ever; left out, the environment variable
            ``SYNCBN_TIMEOUT`` (seconds, or ``none``), else 300.
        name: what error messages call this place, such as ``"layer1.bn1"``.

    Raises:
        SyncError: the callback cannot be called, or the time-out is not a positive number of seconds (also a
            ValueError).

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> def share_of_total(messages):
        ...     total = sum(message for _, message in messages)
        ...     return [(identifier, message / total) for identifier, message in messages]
        >>> master = SyncMaster(share_of_total)
        >>> pipe = master.register_slave(1)
        >>> with ThreadPoolExecutor(1) as pool:
        ...     slave = pool.submit(pipe.run_slave, 30.0)
        ...     master.run_master(10.0), slave.result()
        (0.25, 0.75)
    """

    def __init__(self, callback: Combine, timeout: Timeout = ..., name: str | None = None) -> None:
        if not callable(callback):
            raise MisuseError(f"expected a callback that can be called, got {callback!r:.200}")
        self._callback = callback
        self._timeout = resolve_timeout(timeout)
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._where = self._name or type(self).__name__
        # Guards which set is the present one.
        self._lock = _party.new_lock()
        self._set = self._empty_set()

    def _empty_set(self) -> Rendezvous:
        return Rendezvous(self._timeout)

    def __getstate__(self) -> tuple[Combine, float | None, str | None]:
        return self._callback, self._timeout, self._name

    def __setstate__(self, state: tuple[Combine, float | None, str | None]) -> None:
        self._callback, self._timeout, self._name = state
        self._begin()

    def register_slave(self, identifier: Hashable) -> SlavePipe:
        """Add a slave, before the round; after a finished round, this begins a new and empty set first.

        Args:
            identifier: labels the slave's messages, and must be its own; 0 is the master.

        Returns:
            The pipe for that slave's thread.

        Raises:
            SyncError: the identifier is 0 or taken, or the callback runs (also a ValueError).
            BrokenSyncError: the master is broken; `reset` it first.
        """
        with self._lock:
            if self._set.calls and not self.broken:
                self._forget_set("a slave that registered after a finished round has begun a new set")
            if identifier in self._set.parties and not self.broken:
                raise MisuseError(
                    f"expected an identifier other than {list(self._set.parties)} at '{self._where}' "
                    f"(0 is the master), got {identifier!r}"
                )
            return SlavePipe(self._set, self._set.join(identifier), self._where)

    def run_master(self, msg: Any) -> Any:
        """Post the master's message, wait for all slaves, run the callback, and answer everybody.

        Args:
            msg: any object.

        Returns:
            The master's result. Without slaves the callback runs at once, for the master alone.

        Raises:
            BrokenSyncError: the round broke, or broke earlier; ``__cause__`` is the first failure.
            SyncTimeoutError: the time-out passed, here or for somebody else.
            SyncError: the callback did not answer each of the replicas once (also a ValueError).
            Exception: what the callback raised, as it is.
        """
        rendezvous = self._set
        return rendezvous.meet(rendezvous.parties[0], msg, self._callback, self._where)

    @property
    def nr_slaves(self) -> int:
        """The number of slaves in the present set."""
        return len(self._set.parties) - 1

    @property
    def broken(self) -> bool:
        """Whether a failure has broken the present set."""
        return self._set.failure is not None

    def abort(self, exc: BaseException) -> None:
        """Break the round: whoever waits, or calls before the next `reset`, raises from ``exc``."""
        self._set.abort(exc)

    def reset(self) -> None:
        """Forget slaves and failure: an empty set. Whoever still waits in the old set is told so."""
        with self._lock:
            self._forget_set("the master has been reset")

    def __repr__(self) -> str:
        slaves = list(self._set.parties.values())[1:]
        return _reports.described_master(self._name, slaves, self._set.broken_by)

    def _forget_set(self, reason: str) -> None:
        # The new set first: whoever hears of the change finds it made.
        old, self._set = self._set, self._empty_set()
        old.retire(f"this set of slaves of '{self._where}' is forgotten: {reason}; register anew")
