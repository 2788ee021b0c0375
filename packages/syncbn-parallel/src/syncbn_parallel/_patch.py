"""Replication callbacks for any ``nn.DataParallel``, whatever its methods do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from syncbn_parallel._callbacks import device_of, introduce
from syncbn_parallel._data_parallel import DataParallelWithCallback

_D = TypeVar("_D", bound="nn.DataParallel[Any]")


def patch_replication_callback(data_parallel: _D) -> _D:
    """Make the replicas of an ``nn.DataParallel`` know of each other.

    Its ``replicate``, its own or an overridden one, is followed by the replication callbacks, and a replica that fails reaches the others,
    whatever its ``parallel_apply`` does. Only this object changes. Patching it twice changes nothing more, and neither
    does patching a :class:`DataParallelWithCallback`, which does all this by itself.

    Args:
        data_parallel: an instance of ``nn.DataParallel`` or of a subclass.

    Returns:
        The same object.

    Raises:
        TypeError: it is no ``nn.DataParallel``.

    Example:
        >>> from torch import nn
        >>> from syncbn_parallel import patch_replication_callback
        >>> model = patch_replication_callback(nn.DataParallel(nn.Linear(4, 2)))
    """
    if not isinstance(data_parallel, nn.DataParallel):
        raise TypeError(
            f"expected an nn.DataParallel, got {type(data_parallel).__name__}; "
            "wrap the module in nn.DataParallel, or in DataParallelWithCallback, first"
        )
    own = data_parallel.__dict__.get("replicate")
    if not isinstance(data_parallel, DataParallelWithCallback) and not isinstance(
        own, _ReplicateWithCallback
    ):
        data_parallel.__dict__["replicate"] = _ReplicateWithCallback(data_parallel.replicate)
    return data_parallel


class _ReplicateWithCallback:
    """A ``replicate`` followed by the callbacks; an object, so that copies and pickles of its owner take it along."""

    def __init__(self, replicate: Callable[[nn.Module, Sequence[Any]], list[nn.Module]]) -> None:
        self._replicate = replicate

    def __call__(self, module: nn.Module, device_ids: Sequence[Any]) -> list[nn.Module]:
        replicas = self._replicate(module, device_ids)
        introduce(replicas, list(map(device_of, replicas)))
        return replicas
