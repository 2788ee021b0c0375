"""The code that a compiler traces in training over processes: plain operations and two collectives.

The backward is written by hand, also with plain operations: the one that autograd derives makes more passes
over the batch. It reads x and dy once for the sums that the processes exchange, and once more for dx, in
loops that a compiler fuses with those around them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn_core._kernels.plain import affine_coefficients
from syncbn_core._kernels.protocol import InputGradient
from syncbn_core._kernels.statistics import compute_dtype, merge_dtype, sum_over_batch, unsqueeze_channels
from syncbn_core._options import clamps
from syncbn_core._processes import graph_collectives as collectives
from syncbn_core._processes.collectives import note_compiled
from syncbn_core._processes.graph_collectives import Group

if TYPE_CHECKING:
    from syncbn_core._base import _SynchronizedBatchNorm


def over_processes(layer: _SynchronizedBatchNorm, x: Tensor, group: Group) -> Tensor:
    """Return the layer's output by the statistics of the batches of all processes, in training.

    Args:
        layer: has weight, bias and eps; its running statistics are updated.
        x: ``(N, C, *)``, the batch of this process; N may be 0.
        group: the processes.
    """
    name = layer._name_in_all_processes()
    note_compiled(name)
    count = count_of(x)
    # Detached, not in no_grad: an error inside would leave the graph in no_grad.
    mean, m2 = _statistics_in_one_pass(x.detach(), count)
    mean, m2, total = collectives.merge(mean, m2, count, layer.eps, group, name)
    if count < 2:  # the only case in which the total can be less than 2
        collectives.expect(
            total != 1,
            "Expected more than 1 value per channel when training, got 1 in all replicas together at "
            f"{layer._where()!r}",
        )
    var = m2 / total.clamp(min=1)
    if layer.track_running_stats:
        move = layer._move_running_statistics if count > 0 else partial(_move_unless_empty, layer, total)
        move(mean, m2 / (total - 1))
    if clamps(layer.eps_mode, synchronizes=True):
        invstd, varies = var.clamp(min=layer.eps).rsqrt(), var >= layer.eps
    else:
        invstd, varies = (var + layer.eps).rsqrt(), None
    y: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        x, layer.weight, layer.bias, mean, invstd, varies, total, group.name, group.world_size, name
    )
    return y


def count_of(x: Tensor) -> int:
    """Return how many values each channel of ``x``, ``(N, C, *)``, has; the sizes may be symbols."""
    count = x.shape[0]
    for size in x.shape[2:]:
        count = count * size
    return count


def _statistics_in_one_pass(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 of a batch, ``(C,)`` each, in at least float32.

    The sums are those of ``x - center``, where the center is the mean of the first sample. It is within
    ``sqrt(N)`` standard deviations of the batch's mean, so the difference at the end loses no digits if the
    mean is far from 0. To use the mean of the batch itself would need one more pass.

    Args:
        x: ``(N, C, *)``; N may be 0.
        count: how many values each channel has.
    """
    x = x.to(compute_dtype(x.dtype))
    first = x[:1]
    center = sum_over_batch(first) / max(count_of(first), 1)
    deviation = x - unsqueeze_channels(center, x)
    wide = merge_dtype(x.device)
    total = sum_over_batch(deviation).to(wide)
    rest = total / max(count, 1)
    mean = center.to(wide) + rest
    m2 = sum_over_batch(deviation * deviation).to(wide) - total * rest
    return mean, m2.clamp(min=0)


def _once(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Return the vectors, ``(C,)`` each, as rows of one tensor.

    A compiler computes the rows before the loop over the batch that reads them. Separate vectors it would
    compute inside of that loop, again for every element.
    """
    return torch.stack(vectors).unbind()


def _move_unless_empty(
    layer: _SynchronizedBatchNorm, total: Tensor, mean: Tensor, unbiased_var: Tensor
) -> None:
    """Update the running statistics, unless no process has a value."""
    buffers = [buffer for buffer in layer._buffers.values() if buffer is not None]
    before = [buffer.clone() for buffer in buffers]
    layer._move_running_statistics(mean, unbiased_var)
    for buffer, old in zip(buffers, before):
        buffer.copy_(torch.where(total > 0, buffer, old).view(buffer.shape))


class _Normalize(Function):
    """``(x - mean) * invstd * weight + bias``, differentiated through mean and invstd of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (N, C, *)
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,  # (C,), as the following in at least float32
        invstd: Tensor,
        varies: Tensor | None,  # where invstd depends on x; None for everywhere
        total: Tensor,  # (1,), of values per channel in all processes
        group_name: str,
        world_size: int,
        name: str,
    ) -> Tensor:
        ctx.group, ctx.name = Group(group_name, world_size), name
        ctx.bias_dtype = None if bias is None else bias.dtype
        dtype = compute_dtype(x.dtype)
        scale = invstd if weight is None else invstd * weight
        # x minus the rounded mean; the shift has the rest of the mean: a large mean loses no digits.
        rounded = mean.to(dtype)
        shift = (rounded - mean) * scale
        if bias is not None:
            shift = shift + bias
        rounded, scale, shift = _once(rounded, scale.to(dtype), shift.to(dtype))
        ctx.save_for_backward(x, weight, mean, rounded, invstd, varies, total)
        y = (x.to(dtype) - unsqueeze_channels(rounded, x)) * unsqueeze_channels(scale, x)
        y = y + unsqueeze_channels(shift, x)
        # Not y.to(y.dtype), which is y: the compiler of torch 2.11 returns both, and all gradients become 0.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rounded, invstd, varies, total = ctx.saved_tensors
        dtype = compute_dtype(x.dtype)
        rounding = rounded - mean
        dy_ = dy.to(dtype)
        xmu = x.to(dtype) - unsqueeze_channels(rounded, x)
        sum_dy = sum_over_batch(dy_).to(mean.dtype)
        sum_dy_xmu = sum_over_batch(dy_ * xmu).to(mean.dtype) + rounding * sum_dy
        sums, own_sums = collectives.sum_gradients(sum_dy, sum_dy_xmu, ctx.group, ctx.name)
        total_dy, total_dy_xmu = sums.unbind()
        sum_dy, sum_dy_xmu = own_sums.unbind()
        if varies is not None:
            total_dy_xmu = total_dy_xmu * varies
        total_dy = total_dy + total_dy_xmu * invstd * invstd * rounding
        given = InputGradient(rounded, invstd, weight, total_dy, total_dy_xmu, total.clamp(min=1))
        vectors = _once(*(vector.to(dtype) for vector in affine_coefficients(given)))
        scale, slope, shift = (unsqueeze_channels(vector, x) for vector in vectors)
        dx = (dy_ * scale + xmu * slope + shift).to(x.dtype)
        dweight = None if weight is None else (sum_dy_xmu * invstd).to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)
        return dx, dweight, dbias, *[None] * 7
