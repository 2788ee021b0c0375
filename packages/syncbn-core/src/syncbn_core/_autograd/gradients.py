"""What one node and three nodes share: the reduction of the gradients, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn_core._kernels import PLAIN, kernels_of
from syncbn_core._kernels.protocol import Kernels, Processes, WholeBatch

Sums = tuple[Tensor, Tensor]
"""sum_dy and sum_dy_xmu, ``(C,)`` each."""


class ReducedGradients(NamedTuple):
    """The results of adding the sums of all replicas.

    Attributes:
        dweight: ``(C,)``, over the replicas of this process; None if no output of theirs was used.
        dbias: ``(C,)``, the same.
        sums: ``(2, C)``, sum_dy and sum_dy_xmu over all processes, for the input gradients.
    """

    dweight: Tensor | None
    dbias: Tensor | None
    sums: Tensor


def reduce_gradients(
    parts: Sequence[Sums], whole: WholeBatch, processes: Processes | None
) -> ReducedGradients | None:
    """Add the sums of all replicas, in rank order, and exchange them with the other processes.

    Args:
        parts: the sums of each replica whose output was used, on the device of ``whole``.
        whole: the statistics that the replicas were normalized with.
        processes: the processes, if there are several.

    Returns:
        None if no output was used.
    """
    if not parts and processes is None:
        return None
    mean, invstd, _, rounding, is_floor = whole
    if len(parts) == 1:
        total = torch.stack(parts[0])  # (2, C)
    elif parts:
        total = torch.stack([each for column in zip(*parts) for each in column])  # (2R, C)
        total = total.view(2, len(parts), -1).sum(1)
    else:  # only the chain leads here: this process has nothing to add, but other processes may
        total = torch.zeros(2, len(mean), dtype=mean.dtype, device=mean.device)
    if rounding is not None:  # the kernels used the rounded mean
        total = torch.stack([total[0], torch.addcmul(total[1], total[0], rounding)])
    dweight = dbias = None
    if parts:
        dweight, dbias = total[1] * invstd, total[0]
    if processes is not None:
        dbias = None if dbias is None else parts[0][0] if len(parts) == 1 else dbias.clone()
        total = processes.sum(total)
    if is_floor is not None:
        total = torch.stack([total[0], total[1].masked_fill(is_floor, 0.0)])
    if rounding is not None:
        total = torch.stack([torch.addcmul(total[0], total[1] * invstd * invstd, rounding), total[1]])
    return ReducedGradients(dweight, dbias, total)


def backward_kernels_of(device: torch.device, is_batched: bool) -> Kernels:
    """Return the kernels for a backward. For many gradients at once these are plain operations."""
    return PLAIN if is_batched else kernels_of(device)


def refuse_inside_forward(is_running: Callable[[], bool], name: str) -> None:
    """Check that all replicas have finished their forward before a backward runs.

    Raises:
        RuntimeError: a replica still runs its forward.
    """
    if is_running():
        raise RuntimeError(
            f"expected the backward of {name!r} after the forward of all replicas, got one inside a "
            "replica's forward (torch.autograd.grad or backward() in a module's forward): the gradient would "
            "need the loss of the other replicas, which does not exist yet. Compute the gradient outside the "
            "replicated module, or put the layer into evaluation mode"
        )


def refuse_second_derivative(
    name: str, results: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Under ``create_graph=True``, tie the results of a backward to its inputs by a node that raises."""
    if not torch.is_grad_enabled():
        return results
    tensors = [r for r in results if r is not None]
    refused = iter(_SecondDerivative.apply(name, len(tensors), *tensors, *inputs))  # type: ignore[no-untyped-call]
    return [None if r is None else next(refused) for r in results]


class _SecondDerivative(Function):
    @staticmethod
    def forward(ctx: Any, name: str, n_results: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.where = name
        return tuple(t.view_as(t) for t in tensors[:n_results] if t is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"expected only first derivatives through {ctx.where}, got a request for a second one: the fused "
            "path has none. Build the layer with fused=False, or convert_model(model, fused=False), for "
            "derivatives of any order (gradient penalties, Hessian-vector products)"
        )
