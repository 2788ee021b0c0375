"""Warnings of what runs, but most likely not as its user expects."""

from __future__ import annotations

import warnings
from weakref import WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_parallel._callbacks import has_callback
from syncbn_parallel._module_tree import named_submodules

_hinted: WeakSet[nn.Module] = WeakSet()  # the models whose layers have been mentioned


def warn_of_no_devices() -> None:
    """Say that a model without ``device_ids`` runs alone on a machine without accelerator."""
    warnings.warn(
        "DataParallelWithCallback found no GPU or other accelerator and got no device_ids, so it runs the "
        "module itself, on the whole batch. For replicas on the CPU, pass device_ids=['cpu', 'cpu']",
        stacklevel=3,
    )


def warn_of_local_batch_norms(model: nn.Module, module: nn.Module) -> None:
    """Say, once for each model, that its batch norms normalize each replica by itself.

    Not where one of the layers synchronizes: then somebody has chosen which of them do.
    """
    if model in _hinted:
        return
    local = []
    for name, layer in named_submodules(module):
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
            if has_callback(layer):
                return
            local.append(name)
    if local:
        _hinted.add(model)
        warnings.warn(
            f"expected batch-norm layers that synchronize over the replicas, got {len(local)} that do not "
            f"(the first is {local[0]!r}): in training, each replica normalizes by its part of the batch. "
            "syncbn_convert.convert_model(model) makes them synchronize. If you want them as they are, "
            "call warnings.filterwarnings('ignore', 'expected batch-norm layers that synchronize')",
            stacklevel=4,
        )
