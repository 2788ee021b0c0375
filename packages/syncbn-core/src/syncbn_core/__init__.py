"""Batch normalization that treats all replicas of a model as one batch."""

from ._batchnorm import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)
from ._eps import set_sbn_eps_mode
from ._processes import THIS_PROCESS
from .reference import BatchNorm2dReimpl

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
