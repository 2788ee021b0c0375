"""Torch's own batch-norm kernels, called by what they compute rather than by what they are named.

Four passes over big tensors, each for the CPU, for CUDA, and by plain operations for any other device:

================  =====================================  =============================
pass              reads -> writes                        in
================  =====================================  =============================
local_statistics  x -> (3, C)                            forward, where data enters
normalize         x -> y                                 forward, where data leaves
gradient_sums     dy, x -> (2, C)                        backward, where dy enters
input_gradient    dy, x -> dx                            backward, where dx leaves
================  =====================================  =============================

None of them synchronizes host and device on CUDA. Vectors of length C come in and go out in the wide
dtype in which they are merged; the kernels take them in the dtype of their arithmetic.
"""

import torch
from torch import Tensor

from . import _statistics
from ._statistics import compute_dtype, merge_dtype, samples_per_channel, sum_over_batch, unsqueeze_channels

# Where abs(mean) > _SHIFT_ABOVE * std, sums of x times something lose digits to the mean: the relative error
# of m2 is 1e-5 at a ratio of 10 and 1e-3 at 100. Sums of x - mean do not.
_SHIFT_ABOVE = 10.0

_DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)

_cpu_backward = torch.ops.aten.native_batch_norm_backward.default


def local_statistics(x: Tensor) -> Tensor:
    """Mean, m2 and count of one replica's batch, as :func:`syncbn_core._statistics.local_statistics`."""
    count = samples_per_channel(x)
    if count == 0:
        return torch.zeros(3, x.shape[1], dtype=merge_dtype(x.device), device=x.device)
    if x.is_cpu:
        mean, m2 = _cpu_mean_and_m2(x, count)
    elif x.is_cuda:
        mean, m2 = _cuda_mean_and_m2(x, count)
    else:
        return _statistics.local_statistics(x)
    return torch.stack([mean, m2, torch.full_like(mean, count)]).double()


def _cpu_mean_and_m2(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    if x.dtype == dtype and x.is_contiguous():
        mean = sum_over_batch(x).div_(count)
        m2 = _cpu_gradient_sums(x, x, mean)[1]
    else:
        # Half inputs get statistics in float32 only if there are running statistics in float32.
        running = torch.zeros(2, x.shape[1], dtype=dtype)
        mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
        m2 = var.mul_(count)
    if torch.addcmul(m2, mean, mean, value=-count / _SHIFT_ABOVE**2).min() < 0:
        # Not the mean found above: on channels_last it may itself be far off.
        shift = sum_over_batch(x.to(dtype)) / count
        deviation = x.to(dtype) - unsqueeze_channels(shift, x)
        rest, m2 = _cpu_gradient_sums(deviation, deviation, torch.zeros_like(shift))
        rest = rest.double() / count
        return shift.double() + rest, m2.double() - count * rest * rest
    return mean, m2


def _cuda_mean_and_m2(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # With eps = 0 the variance can be had back from the reciprocal of its root; of 1 / inf too.
    mean, invstd = torch.batch_norm_stats(x, 0.0)
    return mean, count / (invstd.double() * invstd.double())


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * invstd * weight + bias``, as :func:`syncbn_core._statistics.normalize`."""
    if x.numel() == 0:
        return torch.empty_like(x)
    dtype = compute_dtype(x.dtype)
    mean, invstd = mean.to(dtype), invstd.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)
    if x.is_cpu:
        return _cpu_affine(x, mean, invstd if weight is None else invstd * weight, bias)
    return _statistics.normalize(x, mean, invstd, weight, bias)


def _cpu_affine(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``(x - mean) * scale + bias`` in one pass: an evaluation-mode batch norm of variance 1."""
    y: Tensor = torch.native_batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]
    return y


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """``(2, C)``: the sums of ``dy`` and of ``dy * (x - mean)`` over all but the channel axis."""
    if x.numel() == 0:
        return torch.zeros(2, x.shape[1], dtype=merge_dtype(x.device), device=x.device)
    dtype, exact_mean = compute_dtype(x.dtype), mean
    mean = mean.to(dtype)
    if x.is_cpu:
        sums = _cpu_gradient_sums(dy, x, mean)
    elif x.is_cuda:
        reduce = torch.batch_norm_backward_reduce
        sums = reduce(_laid_out_as(x, dy), x, mean, invstd.to(dtype), None, True, False, False)[:2]
    else:
        dy, x = dy.to(dtype), x.to(dtype)
        sums = sum_over_batch(dy), sum_over_batch(dy * (x - unsqueeze_channels(mean, x)))
    sum_dy, sum_dy_xmu = torch.stack(sums).to(merge_dtype(x.device)).unbind()
    # The kernel took the mean rounded to its own dtype.
    return torch.stack([sum_dy, torch.addcmul(sum_dy_xmu, sum_dy, mean - exact_mean)])


def _laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """``dy`` with the strides of ``x``: the kernels for CUDA read both by one of the two layouts."""
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _cpu_gradient_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    # The gradients of bias and weight of an evaluation-mode batch norm of variance 1. This kernel divides by
    # the number of samples: with none of them it takes the whole process along.
    ones = torch.ones_like(mean)
    _, sum_dy_xmu, sum_dy = _cpu_backward(
        dy, x, None, mean, ones, None, None, False, 0.0, [False, True, True]
    )
    if dy.dtype != mean.dtype and not _are_dense_alike(dy, x):
        # Of halves in other layouts this kernel rounds the sum to a half.
        sum_dy = sum_over_batch(dy.to(mean.dtype))
    return sum_dy, sum_dy_xmu


def _are_dense_alike(dy: Tensor, x: Tensor) -> bool:
    return dy.stride() == x.stride() and any(x.is_contiguous(memory_format=layout) for layout in _DENSE)


def input_gradient(dy: Tensor | None, x: Tensor, local_mean: Tensor, coefficients: Tensor) -> Tensor:
    """``a * (dy - shift - slope * (x - local_mean))``: what every replica's dx comes down to.

    Args:
        dy: ``(N, C, *)``, or None for zeros.
        x: ``(N, C, *)``.
        local_mean: ``(C,)``, the mean of this very ``x``: near it, the difference keeps its digits.
        coefficients: ``(3, C)``: a, shift and slope.

    Returns:
        ``(N, C, *)``.
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    dtype = compute_dtype(x.dtype)
    a, shift, slope = coefficients.to(dtype).unbind()
    local_mean = local_mean.to(dtype)
    if x.is_cuda and dy is not None:
        # sum_dy / count and sum_dy_xmu * invstd**2 / count are what the kernel makes of its arguments.
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        ones = torch.ones_like(local_mean)
        dy = _laid_out_as(x, dy)
        return torch.batch_norm_backward_elemt(dy, x, local_mean, ones, a, shift, slope, one)
    _, bias, scale = (coefficients * -coefficients[0]).to(dtype).unbind()
    if not x.is_cpu:
        dx = _statistics.normalize(x, local_mean, scale, None, bias)
    else:
        dx = _cpu_affine(x, local_mean, scale, bias)
    if dy is None:
        return dx
    return dx.addcmul_(dy, unsqueeze_channels(a.to(x.dtype), x))
