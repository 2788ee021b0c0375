"""Warnings about models that run, but probably not as the user expects."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from weakref import WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_parallel._callbacks import has_callback


def warn_the_caller(message: str) -> None:
    """Warn at the line that has called torch or one of these packages."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "syncbn_")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


_hinted: WeakSet[nn.Module] = WeakSet()  # the models that a warning has mentioned


def warn_of_no_devices() -> None:
    """Say that a model without ``device_ids`` runs alone on a machine without accelerator."""
    warn_the_caller(
        "DataParallelWithCallback found no GPU or other accelerator and got no device_ids, so it runs the "
        "module itself, on the whole batch. For replicas on the CPU, pass device_ids=['cpu', 'cpu']"
    )


def warn_of_local_batch_norms(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Say, once for each model, that its batch norms normalize each replica by itself.

    There is no warning if one of the layers synchronizes: then somebody has chosen which of them do.

    Args:
        model: the data-parallel model.
        modules: the modules that it replicates, with their names.
    """
    if model in _hinted:
        return
    local = []
    for name, layer in modules:
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
            if has_callback(layer):
                return
            local.append(name)
    if local:
        _hinted.add(model)
        warn_the_caller(
            f"expected batch-norm layers that synchronize over the replicas, got {len(local)} that do not "
            f"(the first is {local[0]!r}): in training, each replica normalizes by its part of the batch. "
            "syncbn_convert.convert_model(model) makes them synchronize. If you want them as they are, "
            "call warnings.filterwarnings('ignore', 'expected batch-norm layers that synchronize')"
        )
