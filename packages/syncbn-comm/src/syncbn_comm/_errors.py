"""The errors of this package: one family, of which each member is also a standard type."""

from __future__ import annotations

import threading


class SyncError(RuntimeError):
    """The base class of every error that this package raises.

    Example:
        >>> issubclass(SyncTimeoutError, SyncError) and issubclass(SyncTimeoutError, TimeoutError)
        True
    """


class BrokenSyncError(SyncError, threading.BrokenBarrierError):
    """The round can no longer take place; ``__cause__`` is the first failure, in whatever thread it was."""


class SyncTimeoutError(BrokenSyncError, TimeoutError):
    """A replica waited for the whole timeout, and others did not arrive."""


class ReplicaLeftError(BrokenSyncError):
    """A replica has finished while others wait for it, so it will never arrive."""


class MisuseError(SyncError, ValueError):
    """A call that cannot work, whatever the other replicas do; it breaks nothing."""
