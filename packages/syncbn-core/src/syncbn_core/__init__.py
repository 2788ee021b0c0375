"""Batch normalization that treats all replicas of a model as one batch."""

from ._batchnorm import (
    THIS_PROCESS,
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)
from ._eps import set_sbn_eps_mode
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
