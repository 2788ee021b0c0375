"""What makes one replica's failure everybody's, at once, and tells the user which replica and which layer it was."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_parallel._replicate import named_submodules

# The number of a thread's backward pass, -1 outside of any. Read here only.
_current_backward = torch._C._current_graph_task_id

_GROUP = "_replica_group"  # where a replica keeps its group


def refuse_backward() -> None:
    """Raise if this forward was started by a backward pass.

    Gradient checkpointing around a whole model runs its forward a second time, inside backward: statistics would
    be moved twice.

    Raises:
        RuntimeError: this thread is inside a backward pass.
    """
    if _current_backward() != -1:
        raise RuntimeError(
            "expected the forward of a data-parallel model outside of a backward pass, got one inside: most likely "
            "torch.utils.checkpoint is wrapped around the whole model; wrap it around parts of the replicated module instead"
        )


def join_group(replicas: Sequence[nn.Module], group: ReplicaGroup, devices: Sequence[torch.device]) -> None:
    """Make the call of each replica its membership in ``group``, whoever makes the call.

    When a replica has returned, those that wait for it learn at once that it will not come; when it raises, everybody does.
    The exception gets a note that names the replica and the layer.
    """
    for rank, (replica, device) in enumerate(zip(replicas, devices, strict=True)):
        replica.__dict__[_GROUP] = group
        # nn.Module.__call__ looks this up on the instance. Replacing `forward` would leave out the hooks of the replica.
        # The reference is weak: a replica that held itself would live on until the garbage collector comes.
        replica.__dict__["_call_impl"] = partial(_call_as_member, weakref.ref(replica), group, rank, device)


def group_of(replicas: Sequence[nn.Module]) -> ReplicaGroup:
    """Return the group that the replicas have joined; a new one if somebody else made them."""
    group = replicas[0].__dict__.get(_GROUP)
    return group if isinstance(group, ReplicaGroup) else ReplicaGroup(len(replicas))


def _call_as_member(
    reference: weakref.ref[nn.Module],
    group: ReplicaGroup,
    rank: int,
    device: torch.device,
    *args: Any,
    **kwargs: Any,
) -> Any:
    replica = cast(nn.Module, reference())  # alive: this is its own call
    with group.member(rank):
        try:
            return type(replica)._call_impl(replica, *args, **kwargs)
        except BaseException as error:
            where = _layer_of(error, replica)
            error.add_note(f"raised in replica {rank} of {group.world_size} on {device}{where}")
            raise


def _layer_of(error: BaseException, replica: nn.Module) -> str:
    """Return ``", in layer 'layer1.0.bn1' (BatchNorm2d)"`` for the innermost module that was at work."""
    names = {id(module): name for name, module in named_submodules(replica)}
    layer, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if names.get(id(module)):
            layer = f", in layer {names[id(module)]!r} ({type(module).__name__})"
        trace = trace.tb_next
    return layer


def first_failure(errors: Sequence[BaseException | None], group: ReplicaGroup) -> BaseException | None:
    """Return the one of the replicas' exceptions that the user has to see: the cause, not what followed from it."""
    raised = [error for error in errors if error is not None]
    return next((error for error in raised if error is group.failure), raised[0] if raised else None)
