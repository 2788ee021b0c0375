"""Replicas of a module on any devices, several on one device included.

A tensor that lives on the device of a replica is shared. Any other tensor is copied by a differentiable
copy, so the gradients arrive in the original module, wherever its replicas are. All kinds of devices use
the same code, except that CUDA devices have a faster copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parallel._functions import Broadcast

from syncbn_parallel._devices import as_device, moved
from syncbn_parallel._module_references import References, ReplicaReferences, copy_of, turn_attributes
from syncbn_parallel._module_tree import named_submodules

_M = TypeVar("_M", bound=nn.Module)
_T = TypeVar("_T")

# One device's tensors, by the id of the module's own tensor that each of them replaces.
_Tensors = dict[int, Tensor]


def replicate(module: _M, devices: Sequence[int | str | torch.device]) -> list[_M]:
    """Make one replica of ``module`` per entry of ``devices``; a device may occur several times.

    What a replica holds:

    - Parameters: on the device where the module lives, the module's own ``nn.Parameter`` objects, so that the
      gradients of all replicas there add up in them. On another device, differentiable copies, shared by the
      replicas there; they are not leaves, but ``replica.parameters()`` lists them.
    - Buffers: replica 0 holds the module's own, so its in-place updates persist. Every other replica has
      copies of its own, differentiable if the buffer requires grad.
    - Sub-modules: a replica of each, made by its ``_replicate_for_data_parallel()``. What is shared inside
      the module (a module under two names, tied weights) is shared inside a replica.
    - Its forward hooks, and those that its forward adds; these end with the replica.
    - Attributes and hooks that lead to sub-modules, parameters or buffers: bound methods, functions with a
      closure, ``functools.partial``, weak references, and lists, tuples, dicts, sets and deques of these, at
      any depth. In a replica they lead to those of the replica.
    - Everything else by reference. Compiled code belongs to the module for which it was compiled, so a
      replica of a compiled module runs uncompiled.

    A module that is reached through a global variable, or through an attribute of an object that is not a
    module, is not replaced.

    Args:
        module: the module to replicate. It stays as it is.
        devices: the device of each replica. A number is a device of the machine's accelerator, such as CUDA.

    Returns:
        The replicas, in the order of ``devices``.

    Raises:
        RuntimeError: a TorchScript module or a module with uninitialized (lazy) parameters is inside.

    Example:
        >>> from torch import nn
        >>> from syncbn_parallel import replicate
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> first, second = replicate(net, ["cpu", "cpu"])
        >>> second[0].weight is net[0].weight
        True
        >>> first[1].running_mean is net[1].running_mean, second[1].running_mean is net[1].running_mean
        (True, False)
    """
    targets = [as_device(device) for device in devices]
    modules = []
    for name, submodule in named_submodules(module):
        if isinstance(submodule, ScriptModule):
            raise RuntimeError(
                "expected modules of Python code to replicate, got a TorchScript module "
                f"as {name or 'the model'!r}; replicate the module that it was scripted or traced from"
            )
        modules.append(submodule)
    if not targets:
        return []
    parameters = _by_device((p for m in modules for p in m._parameters.values()), targets)
    buffers = _by_device((b for m in modules for b in m._buffers.values()), targets)
    originals = {*map(id, modules), *parameters[targets[0]], *buffers[targets[0]]}
    references = References(originals)
    attributes = list(map(references.attributes_of, modules))
    replicas = []
    for rank, device in enumerate(targets):
        own_buffers = buffers[device]
        if rank > 0:
            used = device in targets[:rank]
            own_buffers = {key: b.clone() if used or id(b) == key else b for key, b in own_buffers.items()}
        own = _assemble(modules, attributes, references, parameters[device], own_buffers)
        replicas.append(cast(_M, own))
    return replicas


def _by_device(tensors: Iterable[Tensor | None], devices: list[torch.device]) -> dict[torch.device, _Tensors]:
    """Return the tensors for each device: the tensors on that device, and copies of the others."""
    originals = {id(t): t for t in tensors if t is not None}
    homes = {t.device for t in originals.values()}
    away = [device for device in dict.fromkeys(devices) if homes != {device}]
    found = dict.fromkeys(devices, originals)
    if len(homes) == 1 and len(away) > 1 and all(d.type == "cuda" for d in (*homes, *away)):
        # One node and a few large transfers for all tensors and devices; their own device has to be first.
        indices = [device.index for device in (*homes, *away)]
        copies = Broadcast.apply(indices, *originals.values())  # type: ignore[no-untyped-call]
        for i, device in enumerate(away, start=1):
            found[device] = dict(zip(originals, copies[i * len(originals) : (i + 1) * len(originals)]))
    else:
        for device in away:
            found[device] = {key: moved(t, device) for key, t in originals.items()}
    return found


def _assemble(
    modules: list[nn.Module],
    attributes: list[list[str]],
    references: References,
    parameters: _Tensors,
    buffers: _Tensors,
) -> nn.Module:
    """Build one replica of the first module from a copy of each module and the tensors for it."""
    copies = {id(module): copy_of(module) for module in modules}
    to_replica = ReplicaReferences(references, {**copies, **buffers, **parameters})
    for module, keys in zip(modules, attributes):
        made = copies[id(module)]
        # Not by nn.Module.__setattr__, which is slow and accepts only leaf tensors as parameters.
        state = made.__dict__
        state["_modules"] = _stand_ins(module._modules, copies) if module._modules else {}
        state["_parameters"] = _stand_ins(module._parameters, parameters) if module._parameters else {}
        state["_buffers"] = _stand_ins(module._buffers, buffers) if module._buffers else {}
        if keys:
            turn_attributes(module, made, keys, to_replica.of)
        if "_flat_weights_names" in state:  # an RNN hands this list to its kernels
            state["_flat_weights"] = [getattr(made, name, None) for name in state["_flat_weights_names"]]
        if "forward" in state and "_orig_mod" in state["_modules"]:  # the result of torch.compile(module)
            state["forward"] = state["_modules"]["_orig_mod"]
        state.pop("_compiled_call_impl", None)  # left by module.compile()
    return copies[id(modules[0])]


def _stand_ins(originals: Mapping[str, _T | None], stand_ins: Mapping[int, _T]) -> dict[str, _T | None]:
    return {key: None if one is None else stand_ins[id(one)] for key, one in originals.items()}
