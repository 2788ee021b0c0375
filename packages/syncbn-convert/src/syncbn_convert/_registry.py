"""What becomes what: the built-in conversions and those that users register."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)
from syncbn_parallel import DataParallelWithCallback

SYNCHRONIZED = (
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    SynchronizedBatchNorm,
)


@dataclass(frozen=True)
class Swap:
    """The module object stays and its class becomes ``target``."""

    target: type[nn.Module]

    def __str__(self) -> str:
        return self.target.__name__


@dataclass(frozen=True)
class Build:
    """``factory(module)`` returns the module that takes its place."""

    factory: Callable[[Any], nn.Module]

    def __str__(self) -> str:
        return f"what {getattr(self.factory, '__qualname__', repr(self.factory))} returns"


@dataclass(frozen=True)
class Wrap:
    """An nn.DataParallel, or an instance of a subclass, gets replication callbacks."""

    wrapper: nn.DataParallel[Any]

    def __str__(self) -> str:
        exact = type(self.wrapper) is nn.DataParallel
        return DataParallelWithCallback.__name__ if exact else "replication callbacks"


Conversion = Swap | Build | Wrap

_BUILT_IN: dict[type[nn.Module], Conversion] = {
    nn.BatchNorm1d: Swap(SynchronizedBatchNorm1d),
    nn.BatchNorm2d: Swap(SynchronizedBatchNorm2d),
    nn.BatchNorm3d: Swap(SynchronizedBatchNorm3d),
    nn.SyncBatchNorm: Swap(SynchronizedBatchNorm),
}

# In the order of registration, under the ids of the handles; the latest registration of a class wins.
_registered: OrderedDict[int, tuple[type[nn.Module], Conversion]] = OrderedDict()


def register_conversion(
    source: type[nn.Module], factory: type[nn.Module] | Callable[[Any], nn.Module]
) -> RemovableHandle:
    """Say what modules of exactly the class ``source`` become under ``convert_model``.

    Subclasses of torch's layers are not guessed at: an activation fused into the layer, frozen statistics or
    a class-conditional affine part each ask for another answer. This is the place to give it.

    Args:
        source: the class to convert. Its subclasses are other classes, with conversions of their own.
        factory: either a subclass of ``source``, which the module's class then becomes: the object stays,
            with everything that it holds. Or any other callable: it gets the module and returns the one
            that takes its place in every parent; it must not change the module, and should hand on its own
            parameters and buffers, so that an optimizer built before still works and ``revert_model`` can
            bring them back. Returning the module itself says: leave it as it is, without a warning.

    Returns:
        A handle: its ``remove()`` takes the registration back, and so does leaving a ``with`` block on it.

    Raises:
        TypeError: ``source`` is not a module class, or ``factory`` cannot be called.

    Example:
        A layer with a fused activation calls ``super().forward``, so deriving from it and from the
        synchronized layer is all it takes:

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
    handle = RemovableHandle(_registered)
    _registered[handle.id] = source, Swap(factory) if swaps else Build(factory)  # type: ignore[arg-type]
    return handle


def conversion_of(source: type[nn.Module]) -> Conversion | None:
    """The conversion of modules of exactly this class; None where nobody has named one."""
    for registered, conversion in reversed(_registered.values()):
        if registered is source:
            return conversion
    return _BUILT_IN.get(source)
