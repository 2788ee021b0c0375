"""Change one module in place: a batch norm layer, or an nn.DataParallel."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn

from syncbn_convert._forward_check import SYNCHRONIZED
from syncbn_convert._revert_notes import note_changes, swap
from syncbn_core import SynchronizedBatchNorm
from syncbn_parallel import DataParallelWithCallback, patch_replication_callback

EpsMode = Literal["plus", "clamp", "clamp_synchronized"]

OPTIONS = ("process_group", "eps_mode", "fused")

# The attribute with a layer's name in the model, for messages.
_LAYER_NAME = "layer_name"


def _added_attributes() -> tuple[str, ...]:
    """Return the attributes that a synchronized layer has beyond those of torch's.

    Each has a default on the class. So a layer whose class was changed needs in its ``__dict__`` only those
    that differ; its forward may add others.
    """
    added = [cls for cls in SYNCHRONIZED.__mro__ if cls not in nn.BatchNorm2d.__mro__]
    values = {name: value for cls in added for name, value in vars(cls).items() if not name.startswith("__")}
    data = [name for name, value in values.items() if not hasattr(value, "__get__")]
    annotated = [name for cls in added for name in inspect.get_annotations(cls)]
    return tuple(dict.fromkeys([*data, *annotated]))


_ADDED = _added_attributes()


def layer_options(process_group: Any, eps_mode: EpsMode | None, fused: bool) -> dict[str, Any]:
    """Return the options that differ from their defaults, after the checks of the layer's constructor."""
    layer = SynchronizedBatchNorm(1, process_group=process_group, eps_mode=eps_mode, fused=fused)
    options = {name: getattr(layer, name) for name in OPTIONS}
    return {name: value for name, value in options.items() if value != getattr(type(layer), name)}


def swap_layer(layer: nn.Module, target: type[nn.Module], options: dict[str, Any], name: str = "") -> None:
    """Make a layer a ``target``; its error messages use ``name``, its name in the model."""
    if not issubclass(
        target, SYNCHRONIZED
    ):  # a class that a user registered, such as one that contains synchronized layers
        swap(layer, target, {}, ())
        return
    attributes = {**options, _LAYER_NAME: name} if name else options
    swap(layer, target, attributes, _ADDED)


def settle(module: nn.Module, training: bool, options: dict[str, Any], name: str) -> None:
    """Give a module that a registered factory built the mode, the options and the name of its place."""
    own = vars(module)
    own["training"] = training
    if isinstance(module, SYNCHRONIZED):
        own.update(options)
        own[_LAYER_NAME] = name or None


def convert_wrapper(wrapper: nn.DataParallel[Any]) -> None:
    """Turn an nn.DataParallel into a DataParallelWithCallback on the same devices, or patch a subclass."""
    if type(wrapper) is not nn.DataParallel:
        _patch(wrapper)
        return
    # Without a GPU, an nn.DataParallel has no device_ids, output_device or dim, and runs its module alone.
    # The constructor may move the module that it gets, so it gets an empty one.
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
