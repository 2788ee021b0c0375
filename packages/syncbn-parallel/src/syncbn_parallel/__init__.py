"""Data parallelism whose replicas can synchronize: on CPUs, on GPUs, several on one device."""

from syncbn_parallel._callbacks import CallbackContext, execute_replication_callbacks
from syncbn_parallel._data_parallel import DataParallelWithCallback
from syncbn_parallel._patch import patch_replication_callback
from syncbn_parallel._replicate import replicate

__all__ = [
    "CallbackContext",
    "DataParallelWithCallback",
    "execute_replication_callbacks",
    "patch_replication_callback",
    "replicate",
]

__version__ = "0.1.0"
