"""A lone replica in each of several processes, on the CPU: the whole layer as one autograd node.

What Gather, Merge and Apply do, in half as many calls of torch. With a small batch these calls, and not the
processes' talk, are what a layer costs. Other processes may work by the three nodes meanwhile: what is sent
is the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._kernels import cpu_backward, mean_and_m2
from ._nodes import refuse_second_derivative
from ._order import Chain
from ._processes import Processes
from ._statistics import check_total, samples_per_channel, unsqueeze_channels

Move = Callable[[Tensor, Tensor], None]
"""(mean, unbiased variance) of the whole batch -> None; moves the running statistics."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    move: Move,
    name: str,
    processes: Processes,
    chain: Chain,
) -> Tensor:
    """Normalise this process's batch by the statistics of all processes' batches.

    Args:
        x: ``(N, C, *)``, N at least 1.
        weight: ``(C,)`` or None, of the dtype of ``x``.
        bias: ``(C,)`` or None, of the dtype of ``x``.
        eps: added to the variance.
        move: what to do with the statistics.
        name: the layer's, for error messages.
        processes: all of them.
        chain: the order of their backward collectives.
    """
    y: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, chain.take(), eps, move, name, processes, chain
    )[0]
    if y.grad_fn is not None:
        chain.give_node(y.grad_fn)
    return y


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        previous: Tensor,
        eps: float,
        move: Move,
        name: str,
        processes: Processes,
        chain: Chain,
    ) -> tuple[Tensor, Tensor]:
        count = samples_per_channel(x)
        own_mean, own_m2 = mean_and_m2(x, count)
        wide_mean, m2, all_counts = processes.merge(own_mean, own_m2, count)
        total = int(all_counts)
        check_total(total, name)
        mean, var = wide_mean.to(x.dtype), (m2 / total).to(x.dtype)
        move(mean, var * (total / (total - 1)))
        invstd = (var + eps).rsqrt_()
        scale = invstd if weight is None else invstd * weight
        # Only a mean far from 0 loses something that counts to its rounding.
        is_far = own_mean.dtype != x.dtype
        rounding = ((mean - wide_mean) * invstd).to(x.dtype) if is_far else None
        ctx.where, ctx.processes, ctx.chain = name, processes, chain
        ctx.eps, ctx.count = eps, total
        ctx.set_materialize_grads(False)
        link = x.new_empty(0)
        ctx.save_for_backward(x, weight, mean, var, scale, rounding, link)
        y = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return y, link

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, scale, rounding, _ = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        ctx.chain.over = True
        dx = dweight = dbias = None
        with torch.no_grad():
            if dy is None:  # reached by the chain alone; but other processes may have something to add
                own = mean.new_zeros(2, len(mean))
            else:
                # The gradients of an evaluation-mode batch norm.
                _, dweight, dbias = cpu_backward(
                    dy, x, None, mean, var, None, None, False, ctx.eps, [False, True, True]
                )
                if rounding is not None:
                    dweight.addcmul_(dbias, rounding)
                own = torch.stack([dbias, dweight])
            sums = ctx.processes.sum(own.double())
            if need_x:
                if rounding is not None:
                    sums[0].addcmul_(sums[1], rounding)
                shift, slope = (sums * (scale / -ctx.count)).to(x.dtype).unbind()
                dx = torch.native_batch_norm(x, slope, shift, mean, var, False, 0.0, ctx.eps)[0]
                if dy is not None:
                    dx.addcmul_(dy, unsqueeze_channels(scale, x))
        results = [dx, dweight if need_weight else None, dbias if need_bias else None]
        return *refuse_second_derivative(ctx.where, results, [dy, x, weight]), *(None,) * 6
