"""Telling the copies of every sub-module that they are copies, and of what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from types import EllipsisType
from typing import Any, Protocol

import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_parallel._failures import join_group
from syncbn_parallel._replicate import named_submodules

_HOOK = "__data_parallel_replicate__"


class CallbackContext:
    """What the copies of one sub-module share during one forward.

    Attributes:
        name: the sub-module's qualified name in the model, ``'layer3.1.bn2'``; ``''`` for the model itself. A module that
            has several names goes by the first, as in ``named_modules()``.
        devices: the ``torch.device`` of each replica, by rank.
        group: the :class:`syncbn_comm.ReplicaGroup` of this forward; its members are the replicas, by rank.

    A callback may hang any further attribute on it, for the other copies to find.
    """

    def __init__(self, name: str, devices: tuple[torch.device, ...], group: ReplicaGroup) -> None:
        self.name = name
        self.devices = devices
        self.group = group

    @property
    def num_replicas(self) -> int:
        """The number of replicas in this forward: of a small batch, fewer than the model has devices."""
        return len(self.devices)

    def __getattr__(self, name: str) -> Any:  # for type checkers: users' attributes have any type
        raise AttributeError(f"no callback has set {name!r} on the context of {self.name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, num_replicas={self.num_replicas})"


class ReplicationCallback(Protocol):
    """A module that wants to know when it has been replicated."""

    def __data_parallel_replicate__(self, ctx: CallbackContext, copy_id: int) -> object:
        """Learn that this is copy ``copy_id`` (0 is the master) of the sub-module that ``ctx`` is about."""


def execute_replication_callbacks(
    modules: Sequence[nn.Module],
    *,
    group: ReplicaGroup | None = None,
    devices: Sequence[torch.device] | None = None,
) -> None:
    """Call ``__data_parallel_replicate__(ctx, copy_id)`` on every sub-module of every replica that defines it.

    The copies of a sub-module get the same :class:`CallbackContext`, one of their own per forward. Replica 0's sub-modules are
    called first, so whatever the master hangs on the context is there when its copies are called. Like
    other special methods, the callback is looked up on the class.

    Args:
        modules: the replicas of one module, master first.
        group: the replicas' rendezvous in the forward to come; None makes one.
        devices: where the replicas live; None asks the first parameter or buffer of each.

    Raises:
        ValueError: the replicas have different numbers of sub-modules, or ``group`` or ``devices`` is of another
            size than ``modules``.

    Example:
        >>> from torch import nn
        >>> from syncbn_parallel import execute_replication_callbacks, replicate
        >>> class Numbered(nn.Identity):
        ...     def __data_parallel_replicate__(self, ctx, copy_id):
        ...         print(f"copy {copy_id} of {ctx.num_replicas} of {ctx.name!r}")
        >>> net = nn.Sequential(nn.Linear(4, 4), Numbered())
        >>> execute_replication_callbacks(replicate(net, ["cpu", "cpu"]))
        copy 0 of 2 of '1'
        copy 1 of 2 of '1'
    """
    if not modules:
        return
    group = group or ReplicaGroup(len(modules))
    places = tuple(devices or map(device_of, modules))
    if not len(modules) == group.world_size == len(places):
        raise ValueError(
            f"expected a group and devices for {len(modules)} replicas, "
            f"got a group of {group.world_size} and {len(places)} devices"
        )
    contexts = [
        CallbackContext(name, places, group) if hasattr(type(module), _HOOK) else None
        for name, module in named_submodules(modules[0])
    ]
    if not any(contexts):
        return
    for copy_id, replica in enumerate(modules):
        submodules = named_submodules(replica)
        if len(submodules) != len(contexts):
            raise ValueError(
                f"expected replicas of one module, got {len(contexts)} sub-modules in replica 0 "
                f"and {len(submodules)} in replica {copy_id}"
            )
        for (_, module), context in zip(submodules, contexts):
            if context is not None:
                module.__data_parallel_replicate__(context, copy_id)


def introduce(
    replicas: Sequence[nn.Module], devices: Sequence[torch.device], timeout: float | EllipsisType | None = ...
) -> None:
    """Make the replicas of one forward a group: they know of each other, and their calls are its members."""
    group = ReplicaGroup(len(replicas), timeout)
    execute_replication_callbacks(replicas, group=group, devices=devices)
    join_group(replicas, group, devices)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter or buffer; the CPU where it has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))
