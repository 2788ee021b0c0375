"""Turn the batch norm layers that other code builds into synchronized ones."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_convert._change_layer import EpsMode, layer_options, swap_layer
from syncbn_convert._forward_check import SYNCHRONIZED
from syncbn_convert._registry import Swap, conversion_of

# Every batch norm layer of torch, and of every subclass, is built by one of these constructors.
_CONSTRUCTORS: tuple[type[nn.Module], ...] = (_BatchNorm, nn.SyncBatchNorm)


class _Block:
    """One ``with patch_sync_batchnorm()``: the options, and the classes that have no conversion."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.left: set[str] = set()

    def finish(self, layer: nn.Module) -> None:
        conversion = conversion_of(type(layer))
        if isinstance(conversion, Swap):
            swap_layer(layer, conversion.target, self.options)
        elif not isinstance(layer, SYNCHRONIZED):
            self.left.add(f"{type(layer).__module__}.{type(layer).__qualname__}")


# A context variable, not a global: other threads and tasks build unchanged layers.
_block: ContextVar[_Block | None] = ContextVar("syncbn_convert.block", default=None)
_lock = threading.Lock()
_users = 0  # how many blocks, in all threads, use the patched constructors


@contextmanager
def patch_sync_batchnorm(
    *, process_group: Any = None, eps_mode: EpsMode | None = None, fused: bool = True
) -> Iterator[None]:
    """Turn every batch norm layer that is built inside the block into a synchronized one.

    This is for models that are built and used in one go, in code that you cannot change. Otherwise prefer
    ``convert_model``, which also knows the names of the layers.

    The constructors of torch's classes are patched, not the names of the classes. So it also works for
    libraries that ran ``from torch.nn import BatchNorm2d`` before. The same classes convert as in
    ``convert_model``. A warning at the end lists the other classes of batch norm layers that were built.
    ``revert_model`` reverts the layers.

    Args:
        process_group: for the layers built inside, as in ``SynchronizedBatchNorm2d``.
        eps_mode: for the layers built inside, as in ``SynchronizedBatchNorm2d``.
        fused: for the layers built inside, as in ``SynchronizedBatchNorm2d``.

    Raises:
        ValueError: ``eps_mode`` is unknown.

    Guarantees:
        - Only layers built in the thread (or asyncio task) of the ``with`` block change.
        - Blocks may be nested, and open in several threads at once. The options of the innermost block count.
        - When the last block ends, also by an exception, torch is as it was before.

    Example:
        >>> import torch
        >>> with patch_sync_batchnorm():
        ...     layer = torch.nn.BatchNorm2d(8)
        >>> type(layer).__name__
        'SynchronizedBatchNorm2d'
        >>> type(torch.nn.BatchNorm2d(8)).__name__
        'BatchNorm2d'
    """
    block = _Block(layer_options(process_group, eps_mode, fused))
    _hold_patch()
    outer = _block.set(block)
    try:
        yield
    finally:
        _block.reset(outer)
        _release_patch()
    if block.left:
        warnings.warn(
            "patch_sync_batchnorm: layers of these classes were built and do not synchronize: "
            f"{', '.join(sorted(block.left))}; use register_conversion(SourceType, "
            "factory) to define what such a layer becomes",
            stacklevel=3,
        )


def _hold_patch() -> None:
    global _users
    with _lock:
        if not _users:
            for cls in _CONSTRUCTORS:
                cls.__init__ = _finishing(cls, cls.__init__)  # type: ignore[method-assign]
        _users += 1


def _release_patch() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            for cls in _CONSTRUCTORS:
                cls.__init__ = cls.__init__.__wrapped__  # type: ignore[attr-defined, method-assign]


def _finishing(cls: type[nn.Module], init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        block = _block.get()
        # An nn.SyncBatchNorm is complete when its own constructor ends, not when that of its base does.
        if block is not None and isinstance(self, nn.SyncBatchNorm) == (cls is nn.SyncBatchNorm):
            block.finish(self)

    return __init__
