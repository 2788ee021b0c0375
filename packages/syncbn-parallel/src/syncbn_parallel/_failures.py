"""One replica's failure made everybody's at once, with a note of which replica and which layer it was."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_parallel._replicate import named_submodules

# Returns the number of the backward pass that this thread is in, -1 outside of one.
_current_backward = torch._C._current_graph_task_id

_GROUP = "_replica_group"  # where a replica keeps the group that it has joined


def refuse_backward() -> None:
    """Raise if a backward pass runs this forward.

    A gradient checkpoint around the whole model does that. What the replicas remember of the first pass is
    gone by then, so they would take their statistics anew and move the running ones twice.

    Raises:
        RuntimeError: this thread is inside a backward pass.
    """
    if _current_backward() != -1:
        raise RuntimeError(
            "expected the forward of a data-parallel model outside of a backward pass, got one inside: most "
            "likely by torch.utils.checkpoint around the whole model; put the checkpoint inside the module "
            "that is replicated, around the parts to recompute"
        )


def join_group(replicas: Sequence[nn.Module], devices: Sequence[torch.device], group: ReplicaGroup) -> None:
    """Make the call of each replica its membership in ``group``, whoever makes that call.

    Whoever waits for a replica learns at once when it has returned, or raised. What it raised gets a note
    that names the replica and the layer.
    """
    for rank, (replica, device) in enumerate(zip(replicas, devices)):
        replica.__dict__[_GROUP] = group
        # nn.Module.__call__ looks this up on the instance; a `forward` in its place would run inside the
        # hooks. Weakly, as in a cycle with itself the replica would outlive its forward.
        call = partial(_call_as_member, weakref.ref(replica), device, group, rank)
        replica.__dict__["_call_impl"] = call


def group_of(replicas: Sequence[nn.Module]) -> ReplicaGroup:
    """Return the group that the replicas have joined; a new one where an override has made them join none."""
    group = replicas[0].__dict__.get(_GROUP)
    return group if isinstance(group, ReplicaGroup) else ReplicaGroup(len(replicas))


def first_failure(errors: Sequence[BaseException | None], group: ReplicaGroup) -> BaseException | None:
    """Return the replicas' exception that the user has to see: the cause, not what followed from it."""
    raised = [error for error in errors if error is not None]
    return next((error for error in raised if error is group.failure), raised[0] if raised else None)


def _call_as_member(
    reference: weakref.ref[nn.Module],
    device: torch.device,
    group: ReplicaGroup,
    rank: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    replica = cast(nn.Module, reference())  # alive, as this is its call
    with group.member(rank):
        try:
            return type(replica)._call_impl(replica, *args, **kwargs)  # type: ignore[no-untyped-call]
        except BaseException as error:
            where = _layer_of(error, replica)
            error.add_note(f"raised in replica {rank} of {group.world_size} on {device}{where}")
            raise


def _layer_of(error: BaseException, replica: nn.Module) -> str:
    """Return ``", in layer 'layer1.0.bn1' (BatchNorm2d)"`` for the innermost layer that was at work."""
    names = {id(module): name for name, module in named_submodules(replica)}
    found = ""
    # Not in the frame that handles the error: before Python 3.13, a look at its locals would keep them, and
    # the error holds that frame.
    trace = error.__traceback__ and error.__traceback__.tb_next
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        name = names.get(id(module))
        if name:
            found = f", in layer {name!r} ({type(module).__name__})"
        trace = trace.tb_next
    return found
