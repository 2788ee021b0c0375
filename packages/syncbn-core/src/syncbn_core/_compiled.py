"""The forward that ``torch.compile`` and ``torch.export`` trace as one graph, collectives included.

The eager layer calls kernels, weak references and other threads, none of which a graph can hold. Under a
compiler a layer takes this way instead: plain operations, which the compiler fuses with their neighbors, and
over processes one collective each way::

    x -> statistics -> all_gather -> merge -> y              forward
    dy -> sums -> all_gather or all_reduce -> dx             backward, written by hand

========================================  ==================================================
a layer                                   is traced as
========================================  ==================================================
in evaluation                             ``torch.nn.functional.batch_norm``
in training, alone                        the same
in training, alone, ``eps_mode="clamp"``  plain operations with their derived backward
in training, over processes               the operations above
with replicas, or with overridden hooks   nothing: the graph breaks, and the layer runs as without a compiler
========================================  ==================================================

No operation here makes the host wait for a device. The layout of what is sent is that of the eager layer, so
a process that compiles its model and one that does not understand each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_core._kernels.plain import normalize
from syncbn_core._kernels.statistics import (
    check_total,
    compute_dtype,
    local_statistics,
    merge_dtype,
    sum_over_batch,
    unsqueeze_channels,
)
from syncbn_core._options import clamps
from syncbn_core._processes import graph_collectives as collectives
from syncbn_core._processes.graph_collectives import Group

if TYPE_CHECKING:
    from syncbn_core._base import _SynchronizedBatchNorm


def is_traceable(layer: _SynchronizedBatchNorm) -> bool:
    """Whether `forward` does what this layer has to do."""
    if not layer.training and layer.running_mean is not None:
        return True
    if layer._place is not None and (layer._place.nested or layer._place.group is not None):
        return False  # no graph holds what other threads do
    return not layer._overrides_reduction and not any(hook in layer.__dict__ for hook in HOOKS)


HOOKS = ("_data_parallel_master", "_compute_mean_std")
"""What a fork may override and the traced forward does not call."""


def forward(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """What the layer makes of ``x``, ``(N, C, *)``, by operations that a compiler can trace."""
    of_batch = layer.training or layer.running_mean is None
    group = collectives.group_of(layer.process_group, layer._where()) if layer.training else None
    if group is not None:
        return _over_processes(layer, x, group)
    clamped = clamps(layer.eps_mode, synchronizes=False)
    if of_batch and clamped:
        return _alone(layer, x)
    if clamped:
        return layer._forward_running(x)
    if layer.training and layer.momentum is None and layer.track_running_stats:
        return _alone_cumulative(layer, x)
    return _BatchNorm.forward(layer, x)


def outside_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a break of the graph around it."""
    reason = "a synchronized layer meets other replicas, which are threads that no graph can hold"
    if "reason" in inspect.signature(torch.compiler.disable).parameters:
        return torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call,no-any-return]
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call,no-any-return]


def not_a_tensor(x: object, where: str) -> str:
    """What to say where a layer is called on something else than a tensor, as ``torch.fx`` does."""
    if isinstance(x, torch.fx.Proxy):
        return (
            f"expected a tensor at {where!r}, got a Proxy of torch.fx.symbolic_trace, which does not trace "
            "through synchronized layers: convert the model back with revert_model (of syncbn_convert), or "
            "use a Tracer whose is_leaf_module() returns True for nn.modules.batchnorm._NormBase"
        )
    return f"expected a tensor at {where!r}, got {type(x).__name__}"


def _alone(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """By the statistics of this batch, where torch's own operation does something else."""
    count = _count(x)
    check_total(count, layer._where())
    mean, m2 = local_statistics(x)
    if count == 0:  # nothing to learn from, nothing to normalize
        invstd = torch.ones_like(mean)
    else:
        mean, invstd = layer._compute_mean_std(mean, m2, count)
    return normalize(x, mean, invstd, layer.weight, layer.bias).to(x.dtype)


def _alone_cumulative(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """With ``momentum=None``: torch's own layer would read its counter on the host, which breaks a graph."""
    dtype = compute_dtype(x.dtype)
    mean, unbiased_var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    y = F.batch_norm(x, mean, unbiased_var, layer.weight, layer.bias, True, 1.0, layer.eps)
    layer._move_running_statistics(mean, unbiased_var)
    return y


def _over_processes(layer: _SynchronizedBatchNorm, x: Tensor, group: Group) -> Tensor:
    """By the statistics of the batches of all processes."""
    layer._own_calls().is_compiled = True
    count = _count(x)
    with torch.no_grad():
        mean, m2 = _statistics_in_one_pass(x, count)
        mean, m2, total = collectives.merge(mean, m2, count, layer.eps, group)
        if count < 2:  # the only case in which the total can be less than 2
            collectives.expect(
                total != 1,
                "Expected more than 1 value per channel when training, got 1 in all replicas together at "
                f"{layer._where()!r}",
            )
        var = m2 / total.clamp(min=1)
        if layer.track_running_stats:
            _move_running_statistics(layer, mean, m2 / (total - 1), total if count == 0 else None)
        if clamps(layer.eps_mode, synchronizes=True):
            invstd, varies = var.clamp(min=layer.eps).rsqrt(), var >= layer.eps
        else:
            invstd, varies = (var + layer.eps).rsqrt(), None
    y: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        x, layer.weight, layer.bias, mean, invstd, varies, total, group.name, group.world_size
    )
    return y


def _count(x: Tensor) -> int:
    """How many values each channel has."""
    count = x.shape[0]
    for size in x.shape[2:]:
        count = count * size
    return count


def _statistics_in_one_pass(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and m2 of a batch, ``(C,)`` each, in at least float32.

    The sums are taken of ``x - center``, where the center is the mean of the first sample. It lies within
    ``sqrt(N)`` standard deviations of the batch's mean, wherever that is, so the difference at the end loses
    no digits to a mean far from 0. The mean of the batch itself would take one more pass over it.

    Args:
        x: ``(N, C, *)``; N may be 0.
        count: how many values each channel has.
    """
    x = x.to(compute_dtype(x.dtype))
    first = x[:1]
    center = sum_over_batch(first) / max(_count(first), 1)
    deviation = x - unsqueeze_channels(center, x)
    wide = merge_dtype(x.device)
    total = sum_over_batch(deviation).to(wide)
    rest = total / max(count, 1)
    mean = center.to(wide) + rest
    m2 = sum_over_batch(deviation * deviation).to(wide) - total * rest
    return mean, m2.clamp(min=0)


def _move_running_statistics(
    layer: _SynchronizedBatchNorm, mean: Tensor, unbiased_var: Tensor, total: Tensor | None
) -> None:
    """Move the running statistics; where a total is given and that is 0, not."""
    buffers = [] if total is None else list(layer._buffers.values())
    before = [None if buffer is None else buffer.clone() for buffer in buffers]
    layer._move_running_statistics(mean, unbiased_var)
    for buffer, old in zip(buffers, before):
        if buffer is not None and old is not None and total is not None:
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
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd, varies, total)
        ctx.group = Group(group_name, world_size)
        ctx.bias_dtype = None if bias is None else bias.dtype
        dtype = compute_dtype(x.dtype)
        scale = invstd if weight is None else invstd * weight
        # x - mean by its rounded mean, and what that leaves in the shift: no digit is lost to a large mean.
        rounded = mean.to(dtype)
        shift = (rounded - mean) * scale
        if bias is not None:
            shift = shift + bias
        y = (x.to(dtype) - unsqueeze_channels(rounded, x)) * unsqueeze_channels(scale.to(dtype), x)
        return (y + unsqueeze_channels(shift.to(dtype), x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, varies, total = ctx.saved_tensors
        dtype = compute_dtype(x.dtype)
        rounded = mean.to(dtype)
        rounding = rounded - mean
        dy_ = dy.to(dtype)
        xmu = x.to(dtype) - unsqueeze_channels(rounded, x)
        sum_dy = sum_over_batch(dy_).to(mean.dtype)
        sum_dy_xmu = sum_over_batch(dy_ * xmu).to(mean.dtype) + rounding * sum_dy
        sums = collectives.sum_gradients(sum_dy, sum_dy_xmu, ctx.group)
        mean_dy, slope = (sums / total.clamp(min=1)).unbind()
        slope = slope * invstd * invstd
        if varies is not None:
            slope = slope * varies
        # dx = scale * (dy - mean_dy - slope * (x - mean))
        scale = invstd if weight is None else invstd * weight
        constant = -scale * (mean_dy + slope * rounding)
        vectors = (scale, -scale * slope, constant)
        scale, slope, constant = (unsqueeze_channels(vector.to(dtype), x) for vector in vectors)
        dx = (dy_ * scale + xmu * slope + constant).to(x.dtype)
        dweight = None if weight is None else (sum_dy_xmu * invstd).to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None, None, None, None
