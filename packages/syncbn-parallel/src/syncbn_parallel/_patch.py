"""Replication callbacks for any ``nn.DataParallel``, with its own methods or overridden ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from syncbn_parallel._callbacks import introduce
from syncbn_parallel._data_parallel import DataParallelWithCallback
from syncbn_parallel._devices import device_of
from syncbn_parallel._module_references import turn_attributes_of_replicas

_D = TypeVar("_D", bound="nn.DataParallel[Any]")


def patch_replication_callback(data_parallel: _D) -> _D:
    """Let the replicas of an ``nn.DataParallel`` synchronize, and fail together.

    After this, its ``replicate``, overridden or not, is followed by the replication callbacks. If a replica
    fails, the others get an error at once, whatever ``parallel_apply`` does. Only this object changes, with
    the copies and pickles that are made of it. A second call changes nothing. A
    :class:`DataParallelWithCallback` needs no patch.

    Args:
        data_parallel: an ``nn.DataParallel``, or an instance of a subclass.

    Returns:
        The same object.

    Raises:
        TypeError: it is not an ``nn.DataParallel``.

    Example:
        >>> from torch import nn
        >>> from syncbn_parallel import patch_replication_callback
        >>> model = patch_replication_callback(nn.DataParallel(nn.Linear(4, 2)))
    """
    if not isinstance(data_parallel, nn.DataParallel):
        raise TypeError(
            f"expected an nn.DataParallel, got {type(data_parallel).__name__}; "
            "wrap the module in nn.DataParallel first, or in DataParallelWithCallback and leave out this call"
        )
    original = data_parallel.replicate
    if not isinstance(data_parallel, DataParallelWithCallback) and not isinstance(original, _WithCallbacks):
        data_parallel.__dict__["replicate"] = _WithCallbacks(original)
    return data_parallel


class _WithCallbacks:
    """A ``replicate`` that is followed by the callbacks: an object, since a closure cannot be pickled."""

    def __init__(self, replicate: Callable[[Any, Sequence[Any]], list[Any]]) -> None:
        self._replicate = replicate

    def __call__(self, module: nn.Module, device_ids: Sequence[Any]) -> list[nn.Module]:
        replicas: list[nn.Module] = self._replicate(module, device_ids)
        turn_attributes_of_replicas(module, replicas)
        introduce(replicas, list(map(device_of, replicas)))
        return replicas
