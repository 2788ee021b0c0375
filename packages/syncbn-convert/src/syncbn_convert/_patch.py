"""Synchronized layers in a model that somebody else's code builds."""

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

from ._layers import EpsMode, layer_options, swap_layer
from ._registry import SYNCHRONIZED, Swap, conversion_of

# The constructors that every batch norm layer of torch, and every subclass, goes through.
_CONSTRUCTORS: tuple[type[nn.Module], ...] = (_BatchNorm, nn.SyncBatchNorm)


class _Block:
    """One ``with patch_sync_batchnorm()``: what its layers get, and the classes that it could not help."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.left: set[str] = set()

    def finish(self, layer: nn.Module) -> None:
        conversion = conversion_of(type(layer))
        if isinstance(conversion, Swap):
            swap_layer(layer, conversion.target, self.options)
        elif not isinstance(layer, SYNCHRONIZED):
            self.left.add(f"{type(layer).__module__}.{type(layer).__qualname__}")


# A context variable, not a global: other threads and tasks build what they always build.
_block: ContextVar[_Block | None] = ContextVar("syncbn_convert.block", default=None)
_lock = threading.Lock()
_users = 0  # of the patched constructors, over all threads


@contextmanager
def patch_sync_batchnorm(
    *, process_group: Any = None, eps_mode: EpsMode | None = None, fused: bool = True
) -> Iterator[None]:
    """Whatever batch norm layer is built inside, by whomever, is a synchronized one.

    For models that are built and used in one go, deep in code that cannot be changed. Otherwise prefer
    ``convert_model``, which also knows the layers' names. It is the constructors of torch's classes that are
    patched, not their names, so libraries that did ``from torch.nn import BatchNorm2d`` long ago are served
    too. As in ``convert_model``, it is layers of exactly torch's classes (and of those with a registered
    class to become) that change; a warning at the end lists the other classes of batch norm layers that
    were built. ``revert_model`` turns the layers back.

    Args:
        process_group: for the layers built inside: as in ``SynchronizedBatchNorm2d``.
        eps_mode: for the layers built inside: as in ``SynchronizedBatchNorm2d``.
        fused: for the layers built inside: as in ``SynchronizedBatchNorm2d``.

    Raises:
        ValueError: ``eps_mode`` is unknown.

    Guarantees:
        - Only layers built in the thread (or asyncio task) of the ``with`` block change.
        - Blocks may be nested, and be open in any number of threads at once; the innermost's options hold.
        - torch is as it was as soon as the last block is left, by an exception or not.

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
            f"{', '.join(sorted(block.left))}; say what such a layer becomes by "
            "register_conversion(SourceType, factory)",
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
