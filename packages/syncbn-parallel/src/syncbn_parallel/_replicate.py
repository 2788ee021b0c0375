"""Replicas of a module on any devices, several on one device included.

The layers in here never look at a device's kind: a tensor that already lives where a replica wants it is
shared, every other one is copied by a differentiable copy. So gradients arrive in the module that was replicated,
whichever way its replicas are spread.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel._functions import Broadcast

_M = TypeVar("_M", bound=nn.Module)

# One device's tensors, by the identity of the base module's tensor that each of them stands for.
_Tensors = dict[int, Tensor]


def replicate(module: _M, devices: Sequence[int | str | torch.device]) -> list[_M]:
    """Make one replica of ``module`` per entry of ``devices``; a device may occur several times.

    What a replica holds:

    - Parameters: on the device where the module lives, the module's own ``nn.Parameter`` objects, so that the gradients of
      all replicas there add up in them. On another device, differentiable copies, shared by that device's
      replicas; they are no leaves, yet ``replica.parameters()`` lists them.
    - Buffers: replica 0 holds the module's own, so an in-place update lasts. Every other replica has copies of its own;
      where a buffer requires grad, its copies are differentiable.
    - Sub-modules: a replica each, made by the sub-module's ``_replicate_for_data_parallel()``. What is shared inside the module
      (a module under two names, tied weights) is shared inside a replica.
    - Everything else by reference, as :func:`torch.nn.parallel.replicate` does.

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
    modules = [m for _, m in named_submodules(module)]
    parameters = _by_device((p for m in modules for p in m._parameters.values()), targets)
    buffers = _by_device((b for m in modules for b in m._buffers.values()), targets)
    replicas = []
    for rank, device in enumerate(targets):
        own_buffers = buffers[device]
        if rank > 0:
            used = device in targets[:rank]
            own_buffers = {k: b.clone() if used or k == id(b) else b for k, b in own_buffers.items()}
        replicas.append(_assemble(modules, parameters[device], own_buffers))
    return replicas  # type: ignore[return-value]  # modules[0] is `module`, an _M


def as_device(device: int | str | torch.device) -> torch.device:
    """Return ``device`` as a ``torch.device``; an ``int`` is the number of a CUDA device."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")  # "cpu:0" names the same device but does not compare equal to it
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def named_submodules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``root.named_modules()`` yields; its chain of nested generators costs a multiple on deep modules."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", root)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        prefix = f"{name}." if name else ""
        pending += [
            (prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None
        ]
    return found


def _by_device(tensors: Iterable[Tensor | None], devices: list[torch.device]) -> dict[torch.device, _Tensors]:
    """Return for each device the tensors themselves, where they live there, and differentiable copies of the others."""
    originals = {id(t): t for t in tensors if t is not None}
    homes = {t.device for t in originals.values()}
    away = [device for device in dict.fromkeys(devices) if homes != {device}]
    on_device = dict.fromkeys(devices, originals)
    if len(homes) == 1 and len(away) > 1 and all(d.type == "cuda" for d in (*homes, *away)):
        # One node and a few large transfers for all tensors and devices. It wants the source's device first.
        indices = [device.index for device in (*homes, *away)]
        copies = iter(Broadcast.apply(indices, *originals.values()))
        rows = [
            dict(zip(originals, copies)) for _ in indices
        ]  # zip asks its first argument first: nothing is lost
        on_device |= dict(zip(away, rows[1:]))
    else:
        on_device |= {d: {key: t.to(d, non_blocking=True) for key, t in originals.items()} for d in away}
    return on_device


def _assemble(modules: list[nn.Module], parameters: _Tensors, buffers: _Tensors) -> nn.Module:
    """Build one replica of ``modules[0]`` from one replica of each module and the tensors that it is to hold."""
    replicas = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[id(module)]
        # Written past nn.Module.__setattr__: it would refuse a tensor that is no leaf as a parameter, and it is slow.
        state = replica.__dict__
        state["_modules"] = {k: c if c is None else replicas[id(c)] for k, c in module._modules.items()}
        state["_parameters"] = {
            k: p if p is None else parameters[id(p)] for k, p in module._parameters.items()
        }
        state["_buffers"] = {k: b if b is None else buffers[id(b)] for k, b in module._buffers.items()}
        if (
            "_flat_weights_names" in state
        ):  # RNNs call their kernels with this list, not with their parameters
            state["_flat_weights"] = [getattr(replica, name, None) for name in replica._flat_weights_names]
        forward = state.get("forward")
        if isinstance(forward, types.MethodType) and forward.__self__ is module:
            state["forward"] = types.MethodType(forward.__func__, replica)
    return replicas[id(modules[0])]
