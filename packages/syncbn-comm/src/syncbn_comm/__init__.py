"""Collectives and a master/slave rendezvous for threads: a failure is an error for all, never a deadlock."""

from syncbn_comm._errors import BrokenSyncError, ReplicaLeftError, SyncError, SyncTimeoutError
from syncbn_comm._future import FutureResult
from syncbn_comm._group import Replica, ReplicaGroup, current_replica
from syncbn_comm._master import SlavePipe, SyncMaster

__all__ = [
    "BrokenSyncError",
    "FutureResult",
    "Replica",
    "ReplicaGroup",
    "ReplicaLeftError",
    "SlavePipe",
    "SyncError",
    "SyncMaster",
    "SyncTimeoutError",
    "current_replica",
]

__version__ = "0.1.0"

# Pickles and tracebacks name the classes as users import them, so that files can move.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
