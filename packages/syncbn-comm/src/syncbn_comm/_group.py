"""The replicas of one forward, or of anything else that threads do together, and the collectives on them."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import reduce
from types import TracebackType
from typing import Any, TypeVar

from syncbn_comm import _party, _reports
from syncbn_comm._errors import MisuseError
from syncbn_comm._party import State
from syncbn_comm._rendezvous import Rendezvous
from syncbn_comm._timeout import Timeout, resolve_timeout

T = TypeVar("T")
Message = TypeVar("Message")
Result = TypeVar("Result")


class _OpenBlocks(threading.local):
    """The members whose ``with`` blocks the calling thread is inside, the innermost last."""

    def __init__(self) -> None:
        # Weak references: an interrupt between `__enter__` and the block leaves an entry that nobody removes.
        self.members: list[weakref.ref[Replica]] = []


_open_blocks = _OpenBlocks()


def current_replica() -> Replica | None:
    """Return the member whose ``with`` block the calling thread is inside, or None outside of any.

    Of nested blocks the innermost counts. Each thread has its own blocks: a thread that is started inside a
    block is not inside it.

    Example:
        >>> group = ReplicaGroup(world_size=1)
        >>> with group.member(0):
        ...     current_replica() is group.member(0)
        True
        >>> current_replica() is None
        True
    """
    members = _open_blocks.members
    while members:
        replica = members[-1]()
        if replica is not None:
            return replica
        members.pop()
    return None


class ReplicaGroup:
    """Threads that do the same work on different data, and know of each other who is still running.

    Each thread takes its member and works inside ``with``: leaving it normally says "I am done", leaving it
    by an exception breaks the group for all. A group is cheap: make one for every forward.

    **Guarantees**

    - Results are combined in rank order, whatever the order of arrival, in the thread of rank 0.
    - Rounds never mix: a fast replica may be at its next place before a slow one has its last result.
    - The first failure breaks the group for everybody at once, for good: whoever waits, or calls later,
      raises a `BrokenSyncError` of its own (of the first failure's class, if that is one of its subclasses)
      whose ``__cause__`` is the first failure.
    - A replica that has left while others wait for it is an error at once (`ReplicaLeftError`), and so are
      replicas that all wait, but at different places. Only a replica that is slow takes the time-out
      (`SyncTimeoutError`).
    - Every method may be called from any thread; one member is for one thread at a time.
    - No message, result or callback is kept after its round. The first failure is kept, with its traceback,
      as long as the group, or until `forget_failure`.

    Args:
        world_size: the number of replicas, at least 1.
        timeout: seconds that one wait may last; None waits for ever; left out, the environment variable
            ``SYNCBN_TIMEOUT`` (seconds, or ``none``), else 300.
        name: put in front of error messages.

    Raises:
        SyncError: ``world_size`` or ``timeout`` is not as above (also a ValueError).

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> group = ReplicaGroup(world_size=3)
        >>> def work(rank):
        ...     with group.member(rank) as replica:
        ...         return replica.all_gather(rank * 10)
        >>> with ThreadPoolExecutor(3) as pool:
        ...     list(pool.map(work, range(3)))
        [[0, 10, 20], [0, 10, 20], [0, 10, 20]]
    """

    def __init__(self, world_size: int, timeout: Timeout = ..., name: str | None = None) -> None:
        if not isinstance(world_size, int) or world_size < 1:
            raise MisuseError(f"expected world_size to be a whole number of at least 1, got {world_size!r}")
        self._rendezvous = Rendezvous(resolve_timeout(timeout), name)
        for rank in range(1, world_size):
            self._rendezvous.join(rank)
        # Weakly, because a replica holds its group: in a cycle both would outlive the forward.
        self._members: weakref.WeakValueDictionary[int, Replica] = weakref.WeakValueDictionary()
        self._lock = _party.new_lock()

    @property
    def world_size(self) -> int:
        """The number of replicas."""
        return len(self._rendezvous.parties)

    @property
    def timeout(self) -> float | None:
        """Seconds that one wait may last; None for ever."""
        return self._rendezvous.timeout

    @property
    def broken(self) -> bool:
        """Whether a failure has broken the group."""
        return self._rendezvous.failure is not None

    @property
    def failure(self) -> BaseException | None:
        """The first failure, the very object, or None."""
        return self._rendezvous.failure

    @property
    def failed_rank(self) -> int | None:
        """The rank of the replica that failed or left first; None if no failure, or no one replica's."""
        rank: int | None = self._rendezvous.failed
        return rank

    @property
    def active_ranks(self) -> list[int]:
        """The ranks, in order, whose ``with`` block has been entered and not left.

        A replica that is used without ``with`` is not among them.
        """
        parties = list(self._rendezvous.parties.values())  # in rank order
        return [rank for rank, party in enumerate(parties) if party.entered]

    def __repr__(self) -> str:
        rendezvous = self._rendezvous
        return _reports.described_group(
            rendezvous.name, list(rendezvous.parties.values()), rendezvous.broken_by
        )

    def member(self, rank: int) -> Replica:
        """Return the replica of this rank, always the same object.

        Raises:
            SyncError: there is no such rank (also a ValueError).
        """
        replica = self._members.get(rank)
        if replica is None:
            self._check_rank(rank, "rank")
            with self._lock:
                replica = self._members.setdefault(rank, Replica(self, rank))
        return replica

    def abort(self, exc: BaseException, *, rank: int | None = None) -> None:
        """Break the group from any thread; the first failure wins, later ones change nothing.

        Args:
            exc: the failure that everybody's error is raised from.
            rank: the replica that failed, where it is known.

        Raises:
            SyncError: ``exc`` is not an exception, or there is no such rank (also a ValueError).
        """
        if rank is not None:
            self._check_rank(rank, "rank")
        self._rendezvous.abort(exc, None if rank is None else self._rendezvous.parties[rank])

    def forget_failure(self) -> None:
        """Let go of the first failure, once it has been raised for somebody to see; the group stays broken.

        An exception holds the frames that it went through, and with them the tensors of a failed forward. If
        one of those frames holds the group, only the garbage collector would end that cycle.
        """
        self._rendezvous.forget_failure()

    def _check_rank(self, rank: int, name: str) -> None:
        if rank not in self._rendezvous.parties:
            raise MisuseError(f"expected {name} to be in 0..{self.world_size - 1}, got {rank!r}")


class Replica:
    """One member of a `ReplicaGroup`; `ReplicaGroup.member` makes it.

    All replicas have to make the same calls in the same order. A result is one object for all of them unless
    it says otherwise, so do not change it in place.

    As a context manager it tells the others when it is done, or has failed. Without ``with`` it counts as
    running for as long as the group exists.

    A thread may enter its member again inside the block; the replica leaves at the end of the outermost one.
    Another thread cannot enter it meanwhile, and nobody can enter it once it has left.

    Attributes:
        group: the `ReplicaGroup` that it is a member of.
        rank: its rank in the group; 0 is the first.

    Example:
        >>> group = ReplicaGroup(world_size=1, name="focal-loss")
        >>> with group.member(0) as replica:
        ...     replica
        <Replica 0 (of 0 to 0) of 'focal-loss', running>
        >>> replica
        <Replica 0 (of 0 to 0) of 'focal-loss', left>
    """

    def __init__(self, group: ReplicaGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self._rendezvous = group._rendezvous
        self._party = group._rendezvous.parties[rank]
        self._open_blocks: list[weakref.ref[Replica]] = []

    @property
    def finished(self) -> bool:
        """Whether this replica has left."""
        return self._party.state is State.LEFT

    def __enter__(self) -> Replica:
        self._rendezvous.enter(self._party)
        # Kept for the end of the block, which for a generator may come in another thread.
        self._open_blocks = _open_blocks.members
        self._open_blocks.append(weakref.ref(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        own = weakref.ref(self)
        if self._open_blocks[-1:] == [own]:
            self._open_blocks.pop()
        elif own in self._open_blocks:  # the blocks of generators may end in any order
            self._open_blocks.remove(own)
        if failure is not None:
            self._rendezvous.abort(failure, self._party)
        self._rendezvous.exit(self._party)

    def __repr__(self) -> str:
        rendezvous = self._rendezvous
        return _reports.described_member(
            rendezvous.name, self._party, len(rendezvous.parties), rendezvous.calls
        )

    def exchange(
        self,
        message: Message,
        combine: Callable[[list[tuple[int, Message]]], Iterable[tuple[int, Result]]],
        *,
        where: str = "",
    ) -> Result:
        """Meet all other replicas at one place, and take this one's share of what becomes of the messages.

        Args:
            message: any object.
            combine: called once, in rank 0's thread, with ``[(0, message), (1, message), ...]``; returns
                ``[(0, result), (1, result), ...]``. Only rank 0's is used.
            where: the place, such as a layer's name; all replicas have to be at the same one.

        Returns:
            This replica's result.

        Raises:
            BrokenSyncError: the group is broken or breaks during the wait; ``__cause__`` is the first
                failure.
            ReplicaLeftError: a replica has left without coming here.
            SyncTimeoutError: the time-out passed, here or for another replica.
            SyncError: this replica has left, or is in another exchange (also a ValueError).
            Exception: in rank 0, what ``combine`` raised, as it is.
        """
        result: Result = self._rendezvous.meet(self._party, message, combine, where)
        return result

    def all_reduce(self, x: T, op: Callable[[T, T], T] = operator.add, *, where: str = "all_reduce") -> T:
        """Fold the ``x`` of all replicas by ``op``, in rank order."""

        def fold(messages: list[tuple[int, T]]) -> list[tuple[int, T]]:
            total = reduce(op, (message for _, message in messages))
            return [(rank, total) for rank, _ in messages]

        return self.exchange(x, fold, where=where)

    def all_gather(self, x: T, *, where: str = "all_gather") -> list[T]:
        """Return the ``x`` of all replicas in rank order, in a list of this replica's own."""
        return self.exchange(x, _gather, where=where)

    def broadcast(self, x: T, src: int = 0, *, where: str = "broadcast") -> T:
        """Return the ``x`` of replica ``src``; that of the others is ignored."""
        self.group._check_rank(src, "src")

        def send(messages: list[tuple[int, T]]) -> list[tuple[int, T]]:
            return [(rank, messages[src][1]) for rank, _ in messages]

        # The source is part of the place, so that replicas that disagree on it get an error.
        return self.exchange(x, send, where=f"{where} from {src}")

    def barrier(self, *, where: str = "barrier") -> None:
        """Wait until all replicas are here."""
        self.exchange(None, lambda messages: messages, where=where)


def _gather(messages: list[tuple[int, Any]]) -> list[tuple[int, list[Any]]]:
    return [(rank, [message for _, message in messages]) for rank, _ in messages]
