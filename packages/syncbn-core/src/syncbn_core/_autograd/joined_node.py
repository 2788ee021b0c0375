"""One autograd node for small batches of several replicas on the CPU, which are normalized as one batch.

Each call of torch releases and takes Python's global lock. Replicas that make many short calls at the same
time spend most of that time on passing the lock to each other. So if batches are small, replica 0 joins them
into one batch and calls torch's own batch norm kernels, one in the forward and one in the backward. The
joined batch is a copy of the inputs, and it is kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn_core._autograd.gradients import refuse_inside_forward, refuse_second_derivative
from syncbn_core._kernels import PLAIN
from syncbn_core._kernels.cpu import train_backward, train_forward
from syncbn_core._kernels.layouts import DENSE, is_batched, laid_out_as
from syncbn_core._kernels.protocol import InputGradient, Reduction, WholeBatch
from syncbn_core._kernels.statistics import samples_per_channel

# Batches of up to this many elements per replica are small (measured on two cores, with 2 and 4 replicas).
JOINED_UP_TO = 2**18


def reduce(inputs: Sequence[Tensor], how: Reduction) -> Sequence[Tensor] | None:
    """Normalize the inputs of all replicas as one batch.

    Args:
        inputs: ``(N, C, *)`` each; at least one sample in all.
        how: the layer's options for the reduction.

    Returns:
        Each replica's output. None, without any effect, if the inputs cannot be joined, or if a mean is so
        far from 0 that the result needs more digits than their dtype has.
    """
    if how.processes is not None or not how.is_standard or not _fit_together(inputs):
        return None
    if any(p is not None and p.dtype != how.dtype for p in (how.weight, how.bias)):
        return None  # the kernels combine half inputs with float32 parameters only
    with torch.no_grad():
        batch = torch.cat([x.detach() for x in inputs])
        samples = samples_per_channel(batch)
        done = train_forward(batch, how.weight, how.bias, how.eps) if samples > 1 else None
        if done is None:
            return None
        y, mean, unbiased_var, invstd = done
        how.move(mean, unbiased_var)
    whole = WholeBatch(mean, invstd, samples)
    outputs: tuple[Tensor, ...] = _JoinedBatchNorm.apply(  # type: ignore[no-untyped-call]
        batch, y, whole, how, how.weight, how.bias, *inputs
    )
    return outputs


def _fit_together(inputs: Sequence[Tensor]) -> bool:
    """Whether one batch of all inputs has the layout of each."""
    first = inputs[0]
    return all(x.shape[1:] == first.shape[1:] for x in inputs) and any(
        all(x.is_contiguous(memory_format=layout) for x in inputs) for layout in DENSE
    )


class _JoinedBatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: Tensor,
        y: Tensor,
        whole: WholeBatch,
        how: Reduction,
        weight: Tensor | None,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        # Not `how` itself: it holds the layer, and so a reference cycle through the graph would be possible.
        ctx.where, ctx.eps, ctx.is_running = how.name, how.eps, how.is_running
        ctx.whole, ctx.sizes = whole, [len(x) for x in inputs]
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        ctx.save_for_backward(batch, weight)
        # `.data`, because an in-place change of one view counts as a change of all the others.
        return tuple(part.data for part in torch.split(y, ctx.sizes))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        refuse_inside_forward(ctx.is_running, ctx.where)
        batch, weight = ctx.saved_tensors
        _, _, _, _, need_weight, need_bias, *need_inputs = ctx.needs_input_grad
        dxs: Sequence[Tensor | None] = [None] * len(dys)
        dweight: Tensor | None
        dbias: Tensor | None
        with torch.no_grad():
            dy = torch.cat(dys)
            if is_batched(dys):
                dx, dweight, dbias = _by_plain_operations(dy, batch, weight, ctx.whole)
                dxs = torch.split(dx, ctx.sizes)
            else:
                wanted = [any(need_inputs), need_weight, need_bias]
                dy = laid_out_as(batch, dy)
                dx, dweight, dbias = train_backward(dy, batch, weight, ctx.whole, ctx.eps, wanted)
                if any(need_inputs):
                    dxs = [part.data for part in torch.split(dx, ctx.sizes)]
            weight_dtype, bias_dtype = ctx.dtypes
            dweight = dweight.to(weight_dtype) if need_weight and dweight is not None else None
            dbias = dbias.to(bias_dtype) if need_bias and dbias is not None else None
        # The batch is a copy that does not require grad, even if the inputs do.
        needing = torch.empty(0, requires_grad=any(need_inputs))
        dweight, dbias, *dxs = refuse_second_derivative(
            ctx.where, [dweight, dbias, *dxs], [*dys, weight, needing]
        )
        return None, None, None, None, dweight, dbias, *dxs


def _by_plain_operations(
    dy: Tensor, x: Tensor, weight: Tensor | None, whole: WholeBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias of many gradients at once."""
    sum_dy, sum_dy_xmu = PLAIN.gradient_sums(dy, x, whole.mean, whole.invstd)
    given = InputGradient(whole.mean, whole.invstd, weight, sum_dy, sum_dy_xmu, whole.samples)
    return PLAIN.input_gradient(dy, x, given), sum_dy_xmu * whole.invstd, sum_dy
