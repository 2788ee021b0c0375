"""Errors for forwards that would give wrong results on replicas, raised before they begin."""

from __future__ import annotations

import torch

# Returns the number of the backward pass that this thread is in, -1 outside of one. Private to torch, which
# has no public way to ask; so is the next one.
_current_backward = torch._C._current_graph_task_id
_transforms_active = torch._C._are_functorch_transforms_active


def refuse_backward() -> None:
    """Raise if a backward pass runs this forward.

    A gradient checkpoint around the whole model does that. The replicas no longer have the statistics of the
    first forward, so they would compute new ones and update the running statistics twice.

    Raises:
        RuntimeError: this thread is inside a backward pass.
    """
    if _current_backward() != -1:
        raise RuntimeError(
            "expected the forward of a data-parallel model outside of a backward pass, got one inside: most "
            "likely by torch.utils.checkpoint around the whole model; put the checkpoint inside the module "
            "that is replicated, around the parts to recompute"
        )


def refuse_transforms() -> None:
    """Raise if a function transform (``torch.func.grad``, ``vmap``, ``jvp``, ...) runs this forward.

    A transform belongs to the thread that entered it. The threads of the replicas would compute without it,
    and the result would be 0 instead of a derivative.

    Raises:
        RuntimeError: a function transform is active in this thread.
    """
    if _transforms_active():
        raise RuntimeError(
            "expected the forward of a data-parallel model outside of function transforms, got one inside "
            "(torch.func.grad, vjp, jvp, jacrev, jacfwd, hessian or vmap): replicas run in other threads, "
            "which the transform does not reach; apply the transform to the module itself, which is the "
            "attribute .module of the data-parallel model"
        )
