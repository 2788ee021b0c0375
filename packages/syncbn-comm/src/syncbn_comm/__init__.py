"""A threaded master/slave rendezvous, and collectives on it, in which nobody waits for ever."""

from syncbn_comm._errors import BrokenSyncError, ReplicaLeftError, SyncError, SyncTimeoutError
from syncbn_comm._future import FutureResult
from syncbn_comm._group import ReplicaGroup
from syncbn_comm._master import SlavePipe, SyncMaster

__all__ = [
    "BrokenSyncError",
    "FutureResult",
    "ReplicaGroup",
    "ReplicaLeftError",
    "SlavePipe",
    "SyncError",
    "SyncMaster",
    "SyncTimeoutError",
]

__version__ = "0.1.0"
