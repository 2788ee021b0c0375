"""Replication callbacks: they tell each copy of a sub-module which copy it is."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from syncbn_comm import ReplicaGroup, SyncMaster
from syncbn_parallel._devices import device_of
from syncbn_parallel._membership import join_group
from syncbn_parallel._module_tree import named_submodules
from syncbn_parallel._refusals import refuse_backward, refuse_transforms

_HOOK = "__data_parallel_replicate__"


class CallbackContext:
    """What the copies of one sub-module share during one forward.

    A callback may set further attributes on it, which the other copies can read. A
    :class:`syncbn_comm.SyncMaster` that is set on it breaks when a replica fails or finishes, so that no
    replica waits at it for one that will not arrive; after the forward it is reset.

    Args:
        name: the sub-module's qualified name in the model, such as ``'layer3.1.bn2'``; ``''`` for the model
            itself. A module with several names has the first of them, as in ``named_modules()``.
        devices: the ``torch.device`` of each replica, by rank. Without it, the context has neither
            ``devices`` nor ``num_replicas``.
        group: the :class:`syncbn_comm.ReplicaGroup` whose members, by rank, are the replicas. Without it,
            the context has no ``group``.

    Attributes:
        name: as above.
        num_replicas: the number of replicas in this forward: for a small batch, fewer than devices.
        devices: as above.
        group: as above.
    """

    __module__ = "syncbn_parallel"  # where users import it from

    num_replicas: int
    devices: tuple[torch.device, ...]
    group: ReplicaGroup

    def __init__(
        self, name: str = "", devices: Sequence[torch.device] | None = None, group: ReplicaGroup | None = None
    ) -> None:
        self.name = name
        if devices is not None:
            self.devices = tuple(devices)
            self.num_replicas = len(self.devices)
        if group is not None:
            self.group = group

    if TYPE_CHECKING:  # any attribute can be set

        def __setattr__(self, attribute: str, value: Any) -> None: ...

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(
            f"expected {attribute!r} on the context of {vars(self).get('name')!r}, got a context on which no "
            "callback has set it"
        )

    def __repr__(self) -> str:
        return f"CallbackContext(name={self.name!r}, num_replicas={vars(self).get('num_replicas')})"


class ReplicationCallback(Protocol):
    """A module that wants to know when it has been replicated."""

    def __data_parallel_replicate__(self, ctx: CallbackContext, copy_id: int) -> object:
        """Get told that this is copy ``copy_id`` (0 is the master) of the sub-module that ``ctx`` names."""


def execute_replication_callbacks(
    modules: Sequence[nn.Module],
    *,
    group: ReplicaGroup | None = None,
    devices: Sequence[torch.device] | None = None,
) -> None:
    """Call ``__data_parallel_replicate__(ctx, copy_id)`` on every sub-module of every replica that has it.

    The copies of one sub-module get one :class:`CallbackContext`. The sub-modules of replica 0 are called
    first, so the other copies can read what they set on the context. The callback may be a method of the
    class, or a function that is set on the object.

    Args:
        modules: the replicas of one module, master first.
        group: the group in which the replicas synchronize in the next forward; None makes one.
        devices: the devices of the replicas; None means the device of the first parameter or buffer of each.

    Raises:
        ValueError: the replicas differ in their number of sub-modules; or ``group`` or ``devices`` has
            another size than ``modules``.

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
    _call_back(modules, group, devices)


def _call_back(
    modules: Sequence[nn.Module], group: ReplicaGroup | None, devices: Sequence[torch.device] | None
) -> list[CallbackContext]:
    """Do what :func:`execute_replication_callbacks` says, and return the contexts."""
    if not modules:
        return []
    if group is None:
        group = ReplicaGroup(len(modules))
    places = tuple(map(device_of, modules)) if devices is None else tuple(devices)
    if not len(modules) == group.world_size == len(places):
        raise ValueError(
            f"expected a group and devices for {len(modules)} replicas, "
            f"got a group of {group.world_size} and {len(places)} devices"
        )
    first = named_submodules(modules[0])
    contexts = [
        CallbackContext(name, places, group) if has_callback(module) else None for name, module in first
    ]
    made = [context for context in contexts if context is not None]
    if not made:
        return []
    for copy_id, replica in enumerate(modules):
        copies = first if copy_id == 0 else named_submodules(replica)
        if len(copies) != len(contexts):
            raise ValueError(
                f"expected replicas of one module, got {len(contexts)} sub-modules in replica 0 "
                f"and {len(copies)} in replica {copy_id}"
            )
        for context, (_, copy) in zip(contexts, copies):
            if context is not None:
                cast(ReplicationCallback, copy).__data_parallel_replicate__(context, copy_id)
    return made


def has_callback(module: nn.Module) -> bool:
    """Return whether the module has a replication callback, on its class or set on the object."""
    return hasattr(type(module), _HOOK) or _HOOK in module.__dict__


def introduce(
    replicas: Sequence[nn.Module], devices: Sequence[torch.device], timeout: float | EllipsisType | None = ...
) -> None:
    """Make the replicas of one forward a group: call their callbacks, and let them succeed or fail together.

    Raises:
        RuntimeError: a backward pass or a function transform runs this forward.
    """
    refuse_backward()
    refuse_transforms()
    group = ReplicaGroup(len(replicas), timeout)
    contexts = _call_back(replicas, group, devices)
    masters = {
        id(value): (context.name, value)
        for context in contexts
        for value in vars(context).values()
        if isinstance(value, SyncMaster)
    }
    join_group(replicas, devices, group, masters.values())
