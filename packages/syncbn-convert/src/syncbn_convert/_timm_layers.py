"""The batch norm layers of timm that have an activation, synchronized.

They call ``torch.nn.functional.batch_norm`` themselves, so their forward has to be replaced. The classes are
recognized by their names. timm is imported only to load the pickle of a model that holds such a layer.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from torch import Tensor, nn

from syncbn_core import SynchronizedBatchNorm, SynchronizedBatchNorm2d

_MODULES = ("timm.layers.norm_act", "timm.models.layers.norm_act")  # today, and before timm 0.8

_lock = threading.Lock()
_made: list[type[nn.Module]] = []  # the synchronized BatchNormAct2d, once there is one


class SynchronizedBatchNormAct(SynchronizedBatchNorm):
    """What ``convert_model`` makes of timm's ``SyncBatchNormAct``: batch norm, then ``drop``, then ``act``.

    Example:
        >>> import torch
        >>> layer = SynchronizedBatchNormAct(3)
        >>> layer.act = torch.nn.ReLU()
        >>> bool(layer(torch.randn(4, 3, 2, 2)).min() >= 0)
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, ``(N, C, *)``, as the synchronized layer does; then drop and activate."""
        return _drop_and_activate(self, super().forward(input))


def timm_target(source: type[nn.Module]) -> type[nn.Module] | None:
    """Return what modules of timm's class ``source`` become; None if it is not one of those."""
    if source.__module__ not in _MODULES:
        return None
    if source.__qualname__ == "SyncBatchNormAct" and issubclass(source, nn.SyncBatchNorm):
        return SynchronizedBatchNormAct
    if source.__qualname__ == "BatchNormAct2d" and issubclass(source, nn.BatchNorm2d):
        return _synchronized_batch_norm_act_2d(source)
    return None


def class_in_pickle(name: str) -> type[nn.Module]:
    """Return the class that a pickle calls ``syncbn_convert.<name>``.

    Raises:
        AttributeError: there is no such class.
        ImportError: timm, whose class it extends, cannot be imported.
    """
    if name == "SynchronizedBatchNormAct":
        return SynchronizedBatchNormAct
    if name != "SynchronizedBatchNormAct2d":
        raise AttributeError(f"module 'syncbn_convert' has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[0])
    except ModuleNotFoundError:
        module = importlib.import_module(_MODULES[1])
    return _synchronized_batch_norm_act_2d(module.BatchNormAct2d)


def _synchronized_batch_norm_act_2d(source: type[nn.Module]) -> type[nn.Module]:
    with _lock:
        if not _made or _made[0].__bases__[0] is not source:
            namespace = {
                "__module__": "syncbn_convert",
                "__doc__": "What ``convert_model`` makes of timm's ``BatchNormAct2d``.",
                "forward": _forward_2d,
            }
            _made[:] = [type("SynchronizedBatchNormAct2d", (source, SynchronizedBatchNorm2d), namespace)]
        return _made[0]


def _forward_2d(self: Any, x: Tensor) -> Tensor:
    """Normalize ``x``, ``(N, C, H, W)``, as the synchronized layer does; then drop and activate."""
    return _drop_and_activate(self, SynchronizedBatchNorm2d.forward(self, x))


def _drop_and_activate(layer: nn.Module, x: Tensor) -> Tensor:
    for name in ("drop", "act"):
        part = getattr(layer, name, None)
        if part is not None:
            x = part(x)
    return x


SynchronizedBatchNormAct.__module__ = "syncbn_convert"
