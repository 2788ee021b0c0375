"""Changing one module in place: a batch norm layer, or an nn.DataParallel."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn

from syncbn_core import SynchronizedBatchNorm
from syncbn_parallel import DataParallelWithCallback, patch_replication_callback

from ._notes import note_changes, swap
from ._registry import SYNCHRONIZED

EpsMode = Literal["plus", "clamp"]

OPTIONS = ("process_group", "eps_mode", "fused")
_LAYER_NAME = "_layer_name"

# All that a synchronized layer has beyond torch's own. Each has a default on the class, so a layer whose
# class was changed needs in its own __dict__ only those that differ; its forward may add others.
_OWN = tuple(inspect.get_annotations(SynchronizedBatchNorm.__bases__[0]))


def layer_options(process_group: Any, eps_mode: EpsMode | None, fused: bool) -> dict[str, Any]:
    """The options that differ from their defaults, checked as the layer's own constructor checks them."""
    layer = SynchronizedBatchNorm(1, process_group=process_group, eps_mode=eps_mode, fused=fused)
    options = {name: getattr(layer, name) for name in OPTIONS}
    return {name: value for name, value in options.items() if value != getattr(type(layer), name)}


def swap_layer(layer: nn.Module, target: type[nn.Module], options: dict[str, Any], name: str = "") -> None:
    """Make a layer a ``target``; ``name``, its place in the model, is for its error messages."""
    if not issubclass(target, SYNCHRONIZED):  # a class that somebody registered: around such layers, say
        swap(layer, target, {}, ())
        return
    attributes = {**options, _LAYER_NAME: name} if name else options
    swap(layer, target, attributes, _OWN)


def settle(module: nn.Module, training: bool, options: dict[str, Any], name: str) -> None:
    """Make a module that a registered factory built part of the model."""
    own = vars(module)
    own["training"] = training
    if isinstance(module, SYNCHRONIZED):
        own.update(options)
        own[_LAYER_NAME] = name or None


def convert_wrapper(wrapper: nn.DataParallel[Any]) -> None:
    """Make a plain nn.DataParallel a DataParallelWithCallback on the same devices; patch a subclass's."""
    if type(wrapper) is not nn.DataParallel:
        _patch(wrapper)
        return
    # Without a GPU, an nn.DataParallel has no device_ids, output_device or dim, and runs its module alone.
    # The constructor gets an empty module, as it may move the one that it gets.
    like = DataParallelWithCallback(
        nn.Module(),
        wrapper.device_ids or None,
        getattr(wrapper, "output_device", None),
        getattr(wrapper, "dim", 0),
    )
    missing = {name: value for name, value in vars(like).items() if name not in vars(wrapper)}
    swap(wrapper, type(like), missing, missing)


def _patch(wrapper: nn.DataParallel[Any]) -> None:
    """Give one nn.DataParallel replication callbacks, and note what that changed."""
    before, origin = dict(vars(wrapper)), type(wrapper)
    patch_replication_callback(wrapper)
    note_changes(wrapper, origin, before)
