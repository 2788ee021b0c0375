"""Telling the copies of every sub-module that they are copies, and of what."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_parallel._devices import device_of
from syncbn_parallel._failures import join_group, refuse_backward
from syncbn_parallel._replicate import named_submodules

_HOOK = "__data_parallel_replicate__"


class CallbackContext:
    """What the copies of one sub-module share during one forward.

    A callback may hang any further attribute on it, for the other copies to find.

    Attributes:
        name: the sub-module's qualified name in the model, such as ``'layer3.1.bn2'``; ``''`` for the model
            itself. A module with several names goes by the first, as in ``named_modules()``.
        num_replicas: how many replicas this forward has; for a small batch, fewer than the model has devices.
        devices: the ``torch.device`` of each replica, by rank.
        group: the :class:`syncbn_comm.ReplicaGroup` whose members, by rank, are the replicas.
    """

    def __init__(self, name: str, devices: tuple[torch.device, ...], group: ReplicaGroup) -> None:
        self.name = name
        self.num_replicas = len(devices)
        self.devices = devices
        self.group = group

    if TYPE_CHECKING:  # any attribute can be set

        def __setattr__(self, attribute: str, value: Any) -> None: ...

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(
            f"no callback has set {attribute!r} on the context of {vars(self).get('name')!r}"
        )

    def __repr__(self) -> str:
        return f"CallbackContext(name={self.name!r}, num_replicas={self.num_replicas})"


class ReplicationCallback(Protocol):
    """A module that wants to know when it has been replicated."""

    def __data_parallel_replicate__(self, ctx: CallbackContext, copy_id: int) -> object:
        """Learn that this is copy ``copy_id``, 0 being the master, of the sub-module that ``ctx`` names."""


def execute_replication_callbacks(
    modules: Sequence[nn.Module],
    *,
    group: ReplicaGroup | None = None,
    devices: Sequence[torch.device] | None = None,
) -> None:
    """Call ``__data_parallel_replicate__(ctx, copy_id)`` on every sub-module of every replica that has it.

    The copies of one sub-module get one :class:`CallbackContext`. The sub-modules of replica 0 are called
    first, so what the master hangs on the context is there when its copies are called. Like other special
    methods, the callback is looked up on the class.

    Args:
        modules: the replicas of one module, master first.
        group: where the replicas meet in the forward to come; None makes a group.
        devices: where the replicas live; None asks the first parameter or buffer of each.

    Raises:
        ValueError: the replicas differ in their number of sub-modules, or there is not one member of
            ``group`` and one of ``devices`` for each of them.

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
    if group is None:
        group = ReplicaGroup(len(modules))
    places = tuple(map(device_of, modules)) if devices is None else tuple(devices)
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
        copies = named_submodules(replica)
        if len(copies) != len(contexts):
            raise ValueError(
                f"expected replicas of one module, got {len(contexts)} sub-modules in replica 0 "
                f"and {len(copies)} in replica {copy_id}"
            )
        for context, (_, copy) in zip(contexts, copies):
            if context is not None:
                cast(ReplicationCallback, copy).__data_parallel_replicate__(context, copy_id)


def introduce(
    replicas: Sequence[nn.Module], devices: Sequence[torch.device], timeout: float | EllipsisType | None = ...
) -> None:
    """Make the replicas of one forward a group: call their callbacks, and let them succeed or fail together.

    Raises:
        RuntimeError: a backward pass runs this forward.
    """
    refuse_backward()
    group = ReplicaGroup(len(replicas), timeout)
    execute_replication_callbacks(replicas, group=group, devices=devices)
    join_group(replicas, devices, group)
