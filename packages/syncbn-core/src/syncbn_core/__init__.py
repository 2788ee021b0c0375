"""Batch normalization that treats all replicas of a model as one batch."""

from syncbn_core._base import _SynchronizedBatchNorm as _SynchronizedBatchNorm
from syncbn_core._layers import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)
from syncbn_core._options import set_sbn_eps_mode
from syncbn_core._processes.collectives import THIS_PROCESS
from syncbn_core.reference import BatchNorm2dReimpl

__all__ = [
    "THIS_PROCESS",
    "BatchNorm2dReimpl",
    "SynchronizedBatchNorm",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "set_sbn_eps_mode",
]
__version__ = "0.1.0"

# Pickles and tracebacks name the classes as users import them, so that files can move.
for _name in (*__all__, "_SynchronizedBatchNorm"):
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
