"""The errors of this package: one small family, each member also a standard type."""

from __future__ import annotations

import threading


class SyncError(RuntimeError):
    """Something is wrong with a rendezvous; the base of every error that this package raises.

    Example:
        >>> issubclass(SyncTimeoutError, SyncError) and issubclass(SyncTimeoutError, TimeoutError)
        True
    """


class BrokenSyncError(SyncError, threading.BrokenBarrierError):
    """The round can no longer take place; ``__cause__`` is the first failure, whoever raised it."""


class SyncTimeoutError(BrokenSyncError, TimeoutError):
    """Somebody waited for the whole time-out, and the others did not come."""


class ReplicaLeftError(BrokenSyncError):
    """A replica that others wait for has finished, so it will never come."""


class MisuseError(SyncError, ValueError):
    """A call that could not work whatever the other replicas do; nothing is broken by it."""
