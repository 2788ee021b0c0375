"""Which class becomes which: the built-in conversions and those that users register."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from syncbn_convert._forward_check import SYNCHRONIZED, why_unsynchronized
from syncbn_convert._timm_layers import timm_target
from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)
from syncbn_parallel import DataParallelWithCallback


@dataclass(frozen=True)
class Swap:
    """The module object stays, and its class becomes ``target``."""

    target: type[nn.Module]

    def __str__(self) -> str:
        return self.target.__name__


@dataclass(frozen=True)
class Build:
    """``factory(module)`` returns the module that replaces it."""

    factory: Callable[[Any], nn.Module]

    def __str__(self) -> str:
        return f"what {getattr(self.factory, '__qualname__', repr(self.factory))} returns"


@dataclass(frozen=True)
class Wrap:
    """An nn.DataParallel, or an instance of a subclass of it, gets replication callbacks."""

    wrapper: nn.DataParallel[Any]

    def __str__(self) -> str:
        exact = type(self.wrapper) is nn.DataParallel
        return DataParallelWithCallback.__name__ if exact else "replication callbacks"


Conversion = Swap | Build | Wrap

_BUILT_IN: dict[type[nn.Module], Swap] = {
    nn.BatchNorm1d: Swap(SynchronizedBatchNorm1d),
    nn.BatchNorm2d: Swap(SynchronizedBatchNorm2d),
    nn.BatchNorm3d: Swap(SynchronizedBatchNorm3d),
    nn.SyncBatchNorm: Swap(SynchronizedBatchNorm),
}

# By the id of the handle, in the order of registration. The latest registration of a class counts.
_registered: OrderedDict[int, tuple[type[nn.Module], Conversion]] = OrderedDict()


def register_conversion(
    source: type[nn.Module], factory: type[nn.Module] | Callable[[Any], nn.Module]
) -> RemovableHandle:
    """Define what ``convert_model`` makes of modules of exactly the class ``source``.

    ``convert_model`` does not guess what a subclass of torch's layers should become: the subclass may have an
    activation, frozen statistics, or a class-conditional affine part. This function defines it.

    Args:
        source: the class to convert. Subclasses of it are not converted by this.
        factory: one of two things. A subclass of ``source``: it becomes the class of the module, and the
            object stays, with everything that it holds. Or any other callable: it gets the module and returns
            a replacement. It must not change the module, and should reuse the parameters and buffers of the
            module, so that an optimizer built before still works and ``revert_model`` can return them. If it
            returns the module itself, the module stays as it is, without a warning.

    Returns:
        A handle. Its ``remove()`` ends the registration, and so does the end of a ``with`` block of it.

    Raises:
        TypeError: ``source`` is not a module class; ``factory`` cannot be called; or ``factory`` derives from
            a synchronized layer but does not synchronize, because its forward does not call that layer's.

    Example:
        The forward of this layer calls ``super().forward``. So a class that derives from it and from the
        synchronized layer needs no code:

        >>> import torch
        >>> from syncbn_core import SynchronizedBatchNorm2d
        >>> class BatchNormReLU(torch.nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> class SynchronizedBatchNormReLU(BatchNormReLU, SynchronizedBatchNorm2d):
        ...     pass
        >>> from syncbn_convert import convert_model
        >>> with register_conversion(BatchNormReLU, SynchronizedBatchNormReLU):
        ...     type(convert_model(BatchNormReLU(8))).__name__
        'SynchronizedBatchNormReLU'
    """
    if not (isinstance(source, type) and issubclass(source, nn.Module)):
        raise TypeError(f"register_conversion: expected a subclass of nn.Module as source, got {source!r}")
    if not callable(factory):
        raise TypeError(
            f"register_conversion: expected a subclass of {source.__name__} or a callable as factory, "
            f"got {factory!r}"
        )
    swaps = isinstance(factory, type) and issubclass(factory, source)
    if swaps and issubclass(factory, SYNCHRONIZED):  # type: ignore[arg-type]
        _check_synchronizes(factory)  # type: ignore[arg-type]
    handle = RemovableHandle(_registered)
    _registered[handle.id] = source, Swap(factory) if swaps else Build(factory)  # type: ignore[arg-type]
    return handle


def conversion_of(source: type[nn.Module]) -> Conversion | None:
    """Return the conversion of modules of exactly this class; None if there is none."""
    for registered, conversion in reversed(_registered.values()):
        if registered is source:
            return conversion
    if source in _BUILT_IN:
        return _BUILT_IN[source]
    target = timm_target(source)
    return None if target is None else Swap(target)


def _check_synchronizes(target: type[nn.Module]) -> None:
    reason = why_unsynchronized(target)
    if reason:
        layers = {conversion.target for conversion in _BUILT_IN.values()}
        layer = next((cls for cls in target.__mro__ if cls in layers), SYNCHRONIZED)
        raise TypeError(
            f"register_conversion: expected a class that synchronizes, got {target.__qualname__}, which "
            f"{reason}: each replica would normalize by its own batch. Give {target.__qualname__} a forward "
            f"that calls {layer.__qualname__}.forward(self, x)"
        )
