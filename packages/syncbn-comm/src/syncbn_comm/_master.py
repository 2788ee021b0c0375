"""A master and its slaves: one callback answers the messages of all of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from syncbn_comm import _error_messages, _locks
from syncbn_comm._errors import MisuseError
from syncbn_comm._participant import Participant
from syncbn_comm._rendezvous import Combine, Rendezvous
from syncbn_comm._timeout import Timeout, resolve_timeout


class SlavePipe:
    """A slave's end of a `SyncMaster`; `SyncMaster.register_slave` makes it."""

    def __init__(self, rendezvous: Rendezvous, participant: Participant, where: str) -> None:
        self._rendezvous = rendezvous
        self._participant = participant
        self._where = where

    @property
    def identifier(self) -> Hashable:
        """The identifier that the slave registered with."""
        return self._participant.identifier

    def run_slave(self, msg: Any) -> Any:
        """Send a message and wait for the result that the master's callback has for this slave.

        Args:
            msg: any object.

        Returns:
            This slave's result.

        Raises:
            BrokenSyncError: the round broke, or a newer set of slaves has replaced this pipe's set;
                ``__cause__`` is the first failure.
            SyncTimeoutError: the timeout passed, here or for another participant.
        """
        return self._rendezvous.meet(self._participant, msg, None, self._where)

    def __repr__(self) -> str:
        return f"<SlavePipe {self._participant.identifier!r} of '{self._where}'>"


class SyncMaster:
    """A master that collects one message from every slave, and answers all of them through one callback.

    Register the slaves, then let every thread make its call: `run_master` in one thread,
    `SlavePipe.run_slave` in each of the others. When all have called, the callback runs once, in the master's
    thread.

    **Sets of slaves.** The slaves that are registered form a set. A set serves any number of rounds. The next
    `register_slave` begins a new, empty set if

    - the present set has completed a round,
    - the present set is broken by a failure, or
    - the identifier is in the present set already: the model was replicated again without a round.

    The pipes of the old set can no longer be used: `SlavePipe.run_slave` raises a `BrokenSyncError`. No set
    is replaced during a round: if somebody waits in it, `register_slave` raises instead.

    **Guarantees**

    - The callback gets the messages in the order of registration, the master's first, whatever the order of
      arrival.
    - Rounds never mix: a fast slave may send its next message before a slow one has fetched its last result,
      and a pipe of an old set never takes part in a round of a newer one. `run_master` takes part in the set
      that is present when it is called.
    - One failure breaks the round for everybody at once: a callback that raises, an `abort`, a timeout, an
      interrupted wait. Everybody who waits, or calls later, raises a separate `BrokenSyncError` whose
      ``__cause__`` is the first failure. The master stays broken until the next `register_slave` or `reset`,
      the pipes of the broken set for good.
    - Every method may be called from any thread. Only one thread at a time may use a pipe.
    - No message or result is kept after its round. Pickles and copies carry the callback, the timeout and the
      name, and no slaves.

    Args:
        master_callback: called with ``[(0, master's message), (identifier, message), ...]``; returns ``[(0,
            master's result), (identifier, result), ...]``, one answer for each of them.
        timeout: seconds that one wait may last; None waits forever. The default is the environment variable
            ``SYNCBN_TIMEOUT`` (seconds, or ``none``), or 300 if it is not set.
        name: what error messages call this place, such as ``"layer1.bn1"``.

    Raises:
        SyncError: the callback is not callable, or the timeout is not a positive number of seconds (also a
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

    def __init__(self, master_callback: Combine, timeout: Timeout = ..., name: str | None = None) -> None:
        if not callable(master_callback):
            raise MisuseError(f"expected a callback that can be called, got {master_callback!r:.200}")
        self._callback = master_callback
        self._timeout = resolve_timeout(timeout)
        self._name = name
        self._begin()

    def _begin(self) -> None:
        self._where = self._name or type(self).__name__
        # Guards the choice of the present set.
        self._lock = _locks.new_lock()
        self._set = self._empty_set()

    def _empty_set(self) -> Rendezvous:
        return Rendezvous(self._timeout)

    def __getstate__(self) -> tuple[Combine, float | None, str | None]:
        return self._callback, self._timeout, self._name

    def __setstate__(self, state: tuple[Combine, float | None, str | None] | Mapping[str, Any]) -> None:
        if isinstance(state, tuple) and len(state) == 3:
            self._callback, self._timeout, self._name = state
        elif isinstance(state, Mapping) and callable(state.get("master_callback")):
            # As the SyncMaster of a vendored sync_batchnorm folder pickles itself.
            self._callback, self._timeout, self._name = state["master_callback"], resolve_timeout(), None
        else:
            raise MisuseError(
                "expected the pickled state of a SyncMaster, of this package or of a vendored sync_batchnorm "
                f"folder ({{'master_callback': ...}}), got {state!r:.200}"
            )
        self._begin()

    def register_slave(self, identifier: Hashable) -> SlavePipe:
        """Add a slave, before the round.

        This begins a new, empty set of slaves first if the present set has completed a round, is broken, or
        holds the identifier already.

        Args:
            identifier: labels the slave's messages; any hashable object but 0, which is the master.

        Returns:
            The pipe for that slave's thread.

        Raises:
            SyncError: the identifier is 0; or a round is under way: the callback runs, or somebody waits in
                the set that this call would replace (also a ValueError).
            BrokenSyncError: another thread breaks the round during this call.
        """
        if identifier == 0:
            raise MisuseError(
                f"expected an identifier other than 0 (the master's) at '{self._where}', got {identifier!r}"
            )
        with self._lock:
            chosen = self._set_for(identifier)
            participant = chosen.join(identifier)
            # Not earlier: a master that finds a new set must not find it empty, and run a round alone.
            self._set = chosen
        return SlavePipe(chosen, participant, self._where)

    def run_master(self, master_msg: Any) -> Any:
        """Send the master's message, wait for all slaves, run the callback, and answer everybody.

        Args:
            master_msg: any object.

        Returns:
            The master's result. Without slaves the callback runs at once, for the master alone.

        Raises:
            BrokenSyncError: the round broke, or broke earlier; ``__cause__`` is the first failure.
            SyncTimeoutError: the timeout passed, here or for a slave.
            SyncError: the callback did not answer each of the replicas once (also a ValueError).
            Exception: what the callback raised, unchanged.
        """
        rendezvous = self._set
        return rendezvous.meet(rendezvous.participants[0], master_msg, self._callback, self._where)

    @property
    def nr_slaves(self) -> int:
        """The number of slaves in the present set."""
        return len(self._set.participants) - 1

    @property
    def broken(self) -> bool:
        """Whether a failure has broken the present set."""
        return self._set.failure is not None

    def abort(self, exc: BaseException) -> None:
        """Break the round: whoever waits, or calls before the next set begins, raises from ``exc``."""
        self._set.abort(exc)

    def reset(self) -> None:
        """Begin a new, empty set of slaves. Whoever still waits in the old one raises."""
        with self._lock:
            # The new set first: whoever hears of the change finds it made.
            old, self._set = self._set, self._empty_set()
            old.retire(self._replaced_by("the master has been reset"))

    def __repr__(self) -> str:
        slaves = list(self._set.participants.values())[1:]
        return _error_messages.described_master(self._name, slaves, self._set.broken_by)

    def _set_for(self, newcomer: Hashable) -> Rendezvous:
        """Return the set that ``newcomer`` has to join: the present one, or a new one in its place."""
        present = self._set
        if present.failure is not None:
            return self._empty_set()  # the pipes of the broken set go on raising its failure
        if present.calls:
            who = "a slave that registered after a complete round"
        elif newcomer in present.participants:
            who = f"{newcomer!r}, which registered again,"
        else:
            return present
        present.retire_idle(self._replaced_by(f"{who} has begun a new set"), newcomer)
        return self._empty_set()

    def _replaced_by(self, reason: str) -> str:
        return f"this set of slaves of '{self._where}' is no longer used: {reason}; register again"
