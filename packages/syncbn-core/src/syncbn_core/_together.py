"""Small batches of several replicas, normalised as the one batch that they are.

Every call of torch gives Python's global lock away and takes it back. Replicas that make many short calls at
the same time spend most of it on handing each other that lock. So where batches are small, the replicas meet
before they do anything: they hand their inputs to replica 0, which makes one batch of them, normalises that,
and hands everybody its part of the result.

That batch is a copy of the inputs, and it is kept for backward. Large batches are not copied: there, every
replica makes the passes over its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _cpu
from ._layouts import DENSE, laid_out_as
from ._nodes import Move, refuse_second_derivative

# So many elements of a replica's input are few (measured on two cores, with 2 and 4 replicas).
UP_TO = 2**18


class Input(NamedTuple):
    """What a replica brings.

    Attributes:
        x: its input, ``(N, C, *)``.
    """

    x: Tensor


def is_small(x: Tensor) -> bool:
    """Whether replica 0 had better work on this input."""
    return x.numel() <= UP_TO


def fit_together(inputs: Sequence[Tensor]) -> bool:
    """Whether they can be joined to one batch that has the layout of each."""
    first = inputs[0]
    return all(x.shape[1:] == first.shape[1:] and x.dtype == first.dtype for x in inputs) and any(
        all(x.is_contiguous(memory_format=layout) for x in inputs) for layout in DENSE
    )


def batch_norm(
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    move: Move,
    name: str,
) -> Sequence[Tensor] | None:
    """Normalise the inputs of all replicas.

    Args:
        inputs: ``(N, C, *)`` each, that `fit_together`.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.
        move: what to do with the statistics.
        name: the layer's, for error messages.

    Returns:
        Each replica's output; None, and nothing is moved, if that needs more digits than the inputs have.
    """
    with torch.no_grad():
        batch = torch.cat([x.detach() for x in inputs])
        done = _cpu.train_forward(batch, weight, bias, eps)
        if done is None:
            return None
        y, mean, unbiased_var, invstd = done
        move(mean, unbiased_var)
    forward = _Forward(batch, y, mean, invstd, eps, name)
    outputs: tuple[Tensor, ...] = _BatchNorm.apply(forward, weight, bias, *inputs)  # type: ignore[no-untyped-call]
    return outputs


class _Forward(NamedTuple):
    """What the node is made of; all tensors are of the joined batch."""

    batch: Tensor
    y: Tensor
    mean: Tensor
    invstd: Tensor
    eps: float
    name: str


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, done: _Forward, weight: Tensor | None, bias: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.where, ctx.eps, ctx.sizes = done.name, done.eps, [len(x) for x in inputs]
        ctx.save_for_backward(done.batch, done.mean, done.invstd, weight)
        # Data and not views: these would be told of the changes that are made to each other in place.
        return tuple(each.data for each in torch.split(done.y, ctx.sizes))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        batch, mean, invstd, weight = ctx.saved_tensors
        _, need_weight, need_bias, *need_inputs = ctx.needs_input_grad
        with torch.no_grad():
            dx, dweight, dbias = _cpu.backward(
                laid_out_as(batch, torch.cat(dys)),
                batch,
                weight,
                None,
                None,
                mean,
                invstd,
                True,
                ctx.eps,
                [any(need_inputs), need_weight, need_bias],
            )
            dxs = (
                [each.data for each in torch.split(dx, ctx.sizes)] if any(need_inputs) else [None] * len(dys)
            )
        results = [dweight if need_weight else None, dbias if need_bias else None, *dxs]
        # The batch is a copy that needs no gradient, even if the inputs do.
        inputs = torch.empty(0, requires_grad=any(need_inputs))
        return None, *refuse_second_derivative(ctx.where, results, [*dys, weight, inputs])
