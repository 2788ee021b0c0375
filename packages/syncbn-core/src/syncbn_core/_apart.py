"""The replicas of this process, each with a batch of its own, as one autograd node; on the CPU.

What Gather, Merge and Apply do, in half as many calls of torch and without their way through autograd for
every replica. Where a process has a single replica of few samples, these calls are what a layer costs, and
not the processes' talk. Other processes may work by the three nodes meanwhile: what is sent is the same.

`enter` and `leave` run in each replica's thread, `reduce` in that of replica 0. The node has to have an
output for every replica before there is one: `reduce` makes them, and `leave` writes them. That of a lone
replica `reduce` writes itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _cpu
from ._nodes import Move, refuse_second_derivative
from ._order import Chain
from ._processes import Processes
from ._statistics import check_total, compute_dtype, merge_statistics, samples_per_channel


class Share(NamedTuple):
    """What a replica brings.

    Attributes:
        x: its input.
        mean: ``(C,)``, of that.
        m2: ``(C,)``, of that.
        samples: how many are behind them.
    """

    x: Tensor
    mean: Tensor
    m2: Tensor
    samples: int


class Reduction(NamedTuple):
    """What the reduction needs to know beside the statistics.

    Attributes:
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.
        move: what to do with the statistics.
        name: the layer's, for error messages.
        processes: those to merge with; None for this one alone.
        chain: where there are several, the order of their backward collectives.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    move: Move
    name: str
    processes: Processes | None
    chain: Chain | None


class Output(NamedTuple):
    """What a replica gets.

    Attributes:
        y: its output; among several replicas, not yet written.
        mean: ``(C,)``, to normalise with.
        var: ``(C,)``, to normalise with.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


def enter(x: Tensor) -> Share:
    """Where data enters.

    Args:
        x: ``(N, C, *)``, N at least 1.
    """
    samples = samples_per_channel(x)
    with torch.no_grad():
        return Share(x, *_cpu.mean_and_m2(x, samples), samples)


def reduce(shares: Sequence[Share], how: Reduction) -> Sequence[Output]:
    """Where data is reduced: the shares of all replicas -> what each of them gets.

    Raises:
        ValueError: there is one sample in all processes together.
        BrokenSyncError: another process failed or did not come.
    """
    previous = how.chain.take() if how.chain is not None else None
    with torch.no_grad():
        whole = _whole(shares, how)
    inputs = [share.x for share in shares]
    *ys, _ = _BatchNorm.apply(how, whole, previous, how.weight, how.bias, *inputs)  # type: ignore[no-untyped-call]
    if how.chain is not None and ys[0].grad_fn is not None:
        how.chain.give_node(ys[0].grad_fn)
    return [Output(y, whole.mean, whole.var) for y in ys]


def leave(output: Output, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Where data leaves: write this replica's output, and return it."""
    y, mean, var = output
    with torch.no_grad():
        _cpu.normalize(x, weight, bias, mean, var, eps, out=y.detach())
    return y


class _Whole(NamedTuple):
    """The statistics of the whole batch, ``(C,)`` each in the dtype of the arithmetic.

    Attributes:
        mean: of it.
        var: of it.
        rounding: what the mean has gained by its rounding, in standard deviations; None if that is nothing.
        samples: how many it has.
    """

    mean: Tensor
    var: Tensor
    rounding: Tensor | None
    samples: int


def _whole(shares: Sequence[Share], how: Reduction) -> _Whole:
    dtype = compute_dtype(shares[0].x.dtype)
    sizes = [share.samples for share in shares]
    samples = sum(sizes)
    # Only a mean far from 0 loses something that counts to its rounding.
    is_far = any(share.mean.dtype != dtype for share in shares)
    rounding = None
    if how.processes is None and not is_far and sizes == sizes[:1] * len(sizes):
        # The usual case, in few calls: all others wait for them.
        var, mean = torch.var_mean(torch.stack([share.mean for share in shares]), 0, correction=0)
        var.add_(torch.stack([share.m2 for share in shares]).sum(0), alpha=1 / samples)
    else:
        wide_mean, m2 = shares[0].mean, shares[0].m2
        if len(shares) > 1:
            parts = [torch.stack([share.mean, share.m2]).double() for share in shares]
            wide_mean, m2 = merge_statistics(parts, sizes)
        if how.processes is not None:
            wide_mean, m2, total = how.processes.merge(wide_mean, m2, samples)
            samples = int(total)
        check_total(samples, how.name)
        mean, var = wide_mean.to(dtype), (m2 / samples).to(dtype)
        if is_far:
            rounding = ((mean - wide_mean) * (var + how.eps).rsqrt()).to(dtype)
    how.move(mean, var * (samples / (samples - 1)))
    return _Whole(mean, var, rounding, samples)


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: Reduction,
        whole: _Whole,
        previous: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        # Not `how` itself: a graph that held the layer could hold itself.
        ctx.where, ctx.processes, ctx.chain, ctx.eps = how.name, how.processes, how.chain, how.eps
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        link = whole.mean.new_empty(0)
        ctx.save_for_backward(*inputs, weight, link)
        if len(inputs) > 1:
            return *map(torch.empty_like, inputs), link
        y = _cpu.normalize(inputs[0], weight, bias, whole.mean, whole.var, how.eps)
        return y, link

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weight, _ = ctx.saved_tensors
        *dys, _ = grads
        _, _, _, need_weight, need_bias, *need_inputs = ctx.needs_input_grad
        if ctx.chain is not None:
            ctx.chain.over = True
        dxs: Sequence[Tensor | None] = [None] * len(inputs)
        with torch.no_grad():
            own = sums = _gradient_sums(dys, inputs, ctx.whole, ctx.eps)
            if ctx.processes is not None:
                # Reached by the chain alone, it has nothing to add, but other processes may.
                packed = torch.stack(own or [torch.zeros_like(ctx.whole.mean)] * 2)
                sums = ctx.processes.sum(packed.double()).to(packed.dtype).unbind()
            if sums is not None and any(need_inputs):
                dxs = _input_gradients(dys, inputs, need_inputs, weight, sums, ctx.whole, ctx.eps)
        dbias, dweight = own or (None, None)
        results = [dweight if need_weight else None, dbias if need_bias else None, *dxs]
        return None, None, None, *refuse_second_derivative(ctx.where, results, [*dys, weight, *inputs])


def _gradient_sums(
    dys: Sequence[Tensor | None], inputs: Sequence[Tensor], whole: _Whole, eps: float
) -> tuple[Tensor, Tensor] | None:
    """The sums over all replicas of dy, and of dy times the normalised x; None if no output was used."""
    parts = [
        _cpu.gradient_sums(dy, x, whole.mean, whole.var, eps) for dy, x in zip(dys, inputs) if dy is not None
    ]
    if not parts:
        return None
    (sum_dy, sum_dy_normalized), *others = parts
    for other in others:  # in rank order
        sum_dy.add_(other[0])
        sum_dy_normalized.add_(other[1])
    if whole.rounding is not None:
        sum_dy_normalized.addcmul_(sum_dy, whole.rounding)
    return sum_dy, sum_dy_normalized


def _input_gradients(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    weight: Tensor | None,
    sums: Sequence[Tensor],
    whole: _Whole,
    eps: float,
) -> Sequence[Tensor | None]:
    """The dx of every replica that needs one, from the sums over all replicas of all processes."""
    mean, var, rounding, samples = whole
    sum_dy, sum_dy_normalized = sums
    if rounding is not None:
        sum_dy = torch.addcmul(sum_dy, sum_dy_normalized, rounding)
    scale = (var + eps).rsqrt_()
    if weight is not None:
        scale.mul_(weight)
    factor = scale / -samples
    slope, shift = sum_dy_normalized * factor, sum_dy * factor
    # The last one first: what has been read just now is in the caches.
    dxs = [
        _cpu.input_gradient(dy, x, scale, slope, shift, mean, var, eps) if need else None
        for dy, x, need in reversed(list(zip(dys, inputs, needed)))
    ]
    return dxs[::-1]
