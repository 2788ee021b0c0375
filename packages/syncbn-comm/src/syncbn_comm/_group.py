"""Replicas: threads that work together, such as in one forward pass, and the collectives for them."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import reduce
from types import TracebackType
from typing import Any, TypeVar

from syncbn_comm import _error_messages, _locks
from syncbn_comm._errors import MisuseError
from syncbn_comm._participant import State
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
    """Threads that do the same work on different data, and that know which of them still run.

    Each thread takes its member and works inside its ``with`` block. A block that ends normally says "I am
    done". A block that ends by an exception breaks the group for all. A group is cheap: make a new one for
    every forward pass.

    **Guarantees**

    - Results are combined in rank order, whatever the order of arrival, in the thread of rank 0.
    - Rounds never mix: a fast replica may reach the next place before a slow one has fetched its last result.
    - The first failure breaks the group for everybody, at once and permanently. Everybody who waits, or calls
      later, raises a separate `BrokenSyncError` (or that subclass of it which the first failure is) whose
      ``__cause__`` is the first failure.
    - There is no deadlock to wait out. If a replica has left while others wait for it, they raise at once
      (`ReplicaLeftError`), and so they do if all wait, but at different places. Only a slow replica makes the
      others wait for the timeout (`SyncTimeoutError`).
    - Every method may be called from any thread. Only one thread at a time may use a member.
    - No message, result or callback is kept after its round. The first failure is kept, with its traceback,
      until the group is deleted or `forget_failure` is called.

    Args:
        world_size: the number of replicas, at least 1.
        timeout: seconds that one wait may last; None waits forever. The default is the environment variable
            ``SYNCBN_TIMEOUT`` (seconds, or ``none``), or 300 if it is not set.
        name: put in front of error messages.

    Raises:
        SyncError: ``world_size`` is not a positive integer, or ``timeout`` not a positive number of seconds
            (also a ValueError).

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
            raise MisuseError(f"expected world_size to be an integer of at least 1, got {world_size!r}")
        self._rendezvous = Rendezvous(resolve_timeout(timeout), name)
        for rank in range(1, world_size):
            self._rendezvous.join(rank)
        # Weak references, because a replica holds its group: in a cycle, both would outlive the forward pass.
        self._members: weakref.WeakValueDictionary[int, Replica] = weakref.WeakValueDictionary()
        self._lock = _locks.new_lock()

    @property
    def world_size(self) -> int:
        """The number of replicas."""
        return len(self._rendezvous.participants)

    @property
    def timeout(self) -> float | None:
        """Seconds that one wait may last; None: no limit."""
        return self._rendezvous.timeout

    @property
    def broken(self) -> bool:
        """Whether a failure has broken the group."""
        return self._rendezvous.failure is not None

    @property
    def failure(self) -> BaseException | None:
        """The first failure: the exception object itself; None if nothing has failed."""
        return self._rendezvous.failure

    @property
    def failed_rank(self) -> int | None:
        """The rank of the replica that failed or left first; None if there is no such replica."""
        rank: int | None = self._rendezvous.failed
        return rank

    @property
    def active_ranks(self) -> list[int]:
        """The ranks, in order, whose ``with`` block has been entered and not left.

        A replica that is used without ``with`` is not among them.
        """
        participants = list(self._rendezvous.participants.values())  # in rank order
        return [rank for rank, participant in enumerate(participants) if participant.entered]

    def __repr__(self) -> str:
        rendezvous = self._rendezvous
        return _error_messages.described_group(
            rendezvous.name, list(rendezvous.participants.values()), rendezvous.broken_by
        )

    def member(self, rank: int) -> Replica:
        """Return the replica of this rank, the same object each time.

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
        """Break the group, from any thread. Only the first failure counts.

        Args:
            exc: the failure; the errors that the replicas raise have it as their ``__cause__``.
            rank: the rank of the replica that failed, if it is known.

        Raises:
            SyncError: ``exc`` is not an exception, or there is no such rank (also a ValueError).
        """
        if rank is not None:
            self._check_rank(rank, "rank")
        self._rendezvous.abort(exc, None if rank is None else self._rendezvous.participants[rank])

    def forget_failure(self) -> None:
        """Release the first failure, after it has been raised to the user; the group stays broken.

        An exception holds the frames that it passed through, and so the tensors of a failed forward pass. If
        one of these frames holds the group, only the garbage collector can free that cycle.
        """
        self._rendezvous.forget_failure()

    def _check_rank(self, rank: int, name: str) -> None:
        if rank not in self._rendezvous.participants:
            raise MisuseError(f"expected {name} to be from 0 to {self.world_size - 1}, got {rank!r}")


class Replica:
    """One member of a `ReplicaGroup`; `ReplicaGroup.member` makes it.

    All replicas have to make the same calls in the same order. Unless a method says otherwise, all of them
    get the same object as the result, so do not change it in place.

    The end of its ``with`` block tells the others that it is done, or has failed. A replica that is used
    without ``with`` counts as running for as long as the group exists.

    A thread may enter its member again inside the block; the replica leaves at the end of the outermost one.
    Another thread cannot enter it meanwhile, and nobody can enter it once it has left.

    Attributes:
        group: its `ReplicaGroup`.
        rank: its rank in the group, from 0.

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
        self._participant = group._rendezvous.participants[rank]
        self._open_blocks: list[weakref.ref[Replica]] = []

    @property
    def finished(self) -> bool:
        """Whether this replica has left."""
        return self._participant.state is State.LEFT

    def __enter__(self) -> Replica:
        self._rendezvous.enter(self._participant)
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
            self._rendezvous.abort(failure, self._participant)
        self._rendezvous.exit(self._participant)

    def __repr__(self) -> str:
        rendezvous = self._rendezvous
        return _error_messages.described_member(
            rendezvous.name, self._participant, len(rendezvous.participants), rendezvous.calls
        )

    def exchange(
        self,
        message: Message,
        combine: Callable[[list[tuple[int, Message]]], Iterable[tuple[int, Result]]],
        *,
        where: str = "",
    ) -> Result:
        """Wait for all replicas at one place, combine their messages, and return this one's result.

        Args:
            message: any object.
            combine: called once, in the thread of rank 0, with ``[(0, message), (1, message), ...]``; returns
                ``[(0, result), (1, result), ...]``. Only the ``combine`` of rank 0 is used.
            where: the place, such as a layer's name; it has to be the same for all replicas.

        Returns:
            This replica's result.

        Raises:
            BrokenSyncError: the group is broken or breaks during the wait; ``__cause__`` is the first
                failure.
            ReplicaLeftError: a replica has left without reaching this place.
            SyncTimeoutError: the timeout passed, here or for another replica.
            SyncError: this replica has left, or is in another exchange (also a ValueError).
            Exception: in rank 0, what ``combine`` raised, unchanged.
        """
        result: Result = self._rendezvous.meet(self._participant, message, combine, where)
        return result

    def all_reduce(self, x: T, op: Callable[[T, T], T] = operator.add, *, where: str = "all_reduce") -> T:
        """Return the ``x`` of all replicas reduced by ``op``, in rank order."""

        def fold(messages: list[tuple[int, T]]) -> list[tuple[int, T]]:
            total = reduce(op, (message for _, message in messages))
            return [(rank, total) for rank, _ in messages]

        return self.exchange(x, fold, where=where)

    def all_gather(self, x: T, *, where: str = "all_gather") -> list[T]:
        """Return the ``x`` of all replicas, in rank order; each replica gets a separate list."""
        return self.exchange(x, _gather, where=where)

    def broadcast(self, x: T, src: int = 0, *, where: str = "broadcast") -> T:
        """Return the ``x`` of replica ``src``; the ``x`` of the others is ignored."""
        self.group._check_rank(src, "src")

        def send(messages: list[tuple[int, T]]) -> list[tuple[int, T]]:
            return [(rank, messages[src][1]) for rank, _ in messages]

        # The source is part of the place, so replicas that disagree about it get an error.
        return self.exchange(x, send, where=f"{where} from {src}")

    def barrier(self, *, where: str = "barrier") -> None:
        """Wait until all replicas have arrived."""
        self.exchange(None, lambda messages: messages, where=where)


def _gather(messages: list[tuple[int, Any]]) -> list[tuple[int, list[Any]]]:
    return [(rank, [message for _, message in messages]) for rank, _ in messages]
