"""Replicas of a module on any devices, several on one device included.

Nothing here looks at what kind of device it has, but for one faster way between GPUs. A tensor that lives
where a replica wants it is shared, any other is copied by a differentiable copy. So the gradients arrive in
the module that was replicated, wherever its replicas are.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel._functions import Broadcast

from syncbn_parallel._devices import as_device, moved

_M = TypeVar("_M", bound=nn.Module)

# One device's tensors; the key is the id of the module's own tensor that each of them stands for.
_Tensors = dict[int, Tensor]

_STOCK_COPY = nn.Module._replicate_for_data_parallel

# What a module's forward looks at to run its hooks.
_HOOKS = tuple(key for key in nn.Module().__dict__ if "forward" in key and "hooks" in key)

# What `_turn_to_copy` is there for, besides lists of modules.
_SEQUENCES = frozenset({list, tuple})
_TURNED = frozenset({"_flat_weights_names", "forward", "_compiled_call_impl"})


def replicate(module: _M, devices: Sequence[int | str | torch.device]) -> list[_M]:
    """Make one replica of ``module`` per entry of ``devices``; a device may occur several times.

    What a replica holds:

    - Parameters: on the device where the module lives, the module's own ``nn.Parameter`` objects, so that the
      gradients of all replicas there add up in them. On another device, differentiable copies, shared by the
      replicas there; they are no leaves, yet ``replica.parameters()`` lists them.
    - Buffers: replica 0 holds the module's own, so its in-place updates last. Every other replica has
      copies of its own, differentiable where the buffer requires grad.
    - Sub-modules: a replica of each, made by its ``_replicate_for_data_parallel()``. What is shared inside
      the module (a module under two names, tied weights) is shared inside a replica.
    - Its forward hooks, and those that its forward adds; these end with the replica.
    - A list or tuple of sub-modules that is a plain attribute: the same of their replicas.
    - Everything else by reference. Compiled code belongs to the module it was compiled for: a replica of a
      compiled module runs uncompiled.

    Args:
        module: the module to replicate. It stays as it is.
        devices: where the replicas go. An ``int`` is the number of a CUDA device.

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
        if isinstance(submodule, torch.jit.ScriptModule):
            raise RuntimeError(
                "expected modules of Python code to replicate, got a TorchScript module "
                f"as {name or 'the model'!r}; replicate what it was scripted or traced from"
            )
        modules.append(submodule)
    parameters = _by_device((p for m in modules for p in m._parameters.values()), targets)
    buffers = _by_device((b for m in modules for b in m._buffers.values()), targets)
    originals = list(map(_Original, modules))
    replicas = []
    for rank, device in enumerate(targets):
        own_buffers = buffers[device]
        if rank > 0:
            used = device in targets[:rank]
            own_buffers = {key: b.clone() if used or id(b) == key else b for key, b in own_buffers.items()}
        replicas.append(cast(_M, _assemble(originals, parameters[device], own_buffers)))
    return replicas


def named_submodules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``root.named_modules()`` yields, without its chain of generators, one per level."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending = [("", root)]
    while pending:
        name, module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.append((name, module))
            prefix = f"{name}." if name else ""
            children = reversed(module._modules.items())
            pending += [(prefix + key, child) for key, child in children if child is not None]
    return found


def _by_device(tensors: Iterable[Tensor | None], devices: list[torch.device]) -> dict[torch.device, _Tensors]:
    """Return the tensors for each device: themselves where they live there, else differentiable copies."""
    originals = {id(t): t for t in tensors if t is not None}
    homes = {t.device for t in originals.values()}
    away = [device for device in dict.fromkeys(devices) if homes != {device}]
    found = dict.fromkeys(devices, originals)
    if len(homes) == 1 and len(away) > 1 and all(d.type == "cuda" for d in (*homes, *away)):
        # One node and a few large transfers for all tensors and devices; it wants their own device first.
        indices = [device.index for device in (*homes, *away)]
        copies = Broadcast.apply(indices, *originals.values())  # type: ignore[no-untyped-call]
        for i, device in enumerate(away, start=1):
            found[device] = dict(zip(originals, copies[i * len(originals) : (i + 1) * len(originals)]))
    else:
        for device in away:
            found[device] = {key: moved(t, device) for key, t in originals.items()}
    return found


def _assemble(modules: list[_Original], parameters: _Tensors, buffers: _Tensors) -> nn.Module:
    """Build one replica of the first module from a copy of each and the tensors that it is to hold."""
    copies = {id(original.module): original.copy() for original in modules}
    for original in modules:
        module = original.module
        copy = copies[id(module)]
        # Past nn.Module.__setattr__, which is slow and refuses a tensor that is no leaf as a parameter.
        state = copy.__dict__
        state["_modules"] = {k: None if m is None else copies[id(m)] for k, m in module._modules.items()}
        state["_parameters"] = _stand_ins(module._parameters, parameters)
        state["_buffers"] = _stand_ins(module._buffers, buffers)
        if original.needs_turning:
            _turn_to_copy(module, copy, copies)
    return copies[id(modules[0].module)]


def _stand_ins(originals: Mapping[str, Tensor | None], tensors: _Tensors) -> dict[str, Tensor | None]:
    return {key: None if t is None else tensors[id(t)] for key, t in originals.items()}


class _Original:
    """A module that is copied once for each replica, and what is found out about it once for all of them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._kind = type(module)
        self._by_itself = self._kind._replicate_for_data_parallel is not _STOCK_COPY
        state = module.__dict__
        # What a module makes of itself has to be looked at in the copy.
        self.needs_turning = self._by_itself or not _TURNED.isdisjoint(state) or _has_lists_of_modules(state)

    def copy(self) -> nn.Module:
        """Return ``module._replicate_for_data_parallel()``, with hooks of its own.

        nn.Module's own is repeated here: the attributes that it sets one by one are replaced anyway, and
        setting them takes most of the time of a replication.
        """
        if self._by_itself:
            copy = cast(nn.Module, self.module._replicate_for_data_parallel())  # type: ignore[no-untyped-call]
        else:
            copy = self._kind.__new__(self._kind)
            object.__setattr__(copy, "__dict__", {**self.module.__dict__, "_is_replica": True})
        state = copy.__dict__
        for key in _HOOKS:
            hooks = state[key]
            state[key] = hooks.copy() if hooks else OrderedDict()
        return copy


def _has_lists_of_modules(state: Mapping[str, Any]) -> bool:
    values = state.values()
    if _SEQUENCES.isdisjoint(map(type, values)):
        return False
    return any(type(v) in _SEQUENCES and v and isinstance(v[0], nn.Module) for v in values)


def _turn_to_copy(module: nn.Module, copy: nn.Module, copies: dict[int, nn.Module]) -> None:
    """Turn to ``copy`` what it has taken over from ``module`` and would still work on ``module``."""
    state = copy.__dict__
    for key, value in state.items():
        if type(value) in _SEQUENCES and value and isinstance(value[0], nn.Module):
            state[key] = type(value)(copies.get(id(m), m) for m in value)
    if "_flat_weights_names" in state:  # an RNN hands this list to its kernels
        state["_flat_weights"] = [getattr(copy, name, None) for name in state["_flat_weights_names"]]
    forward = state.get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        state["forward"] = types.MethodType(forward.__func__, copy)
    elif forward is not None and "_orig_mod" in copy._modules:  # the result of torch.compile(module)
        state["forward"] = copy._modules["_orig_mod"]
    state.pop("_compiled_call_impl", None)  # left by module.compile()
