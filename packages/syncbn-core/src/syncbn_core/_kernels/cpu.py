"""Torch's own batch-norm kernels on the CPU, and which of them is the fastest for an input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from syncbn_core._kernels.layouts import is_dense
from syncbn_core._kernels.plain import affine_coefficients
from syncbn_core._kernels.protocol import InputGradient, Reduction, Statistics, WholeBatch
from syncbn_core._kernels.statistics import (
    compute_dtype,
    local_statistics,
    merge_statistics,
    samples_per_channel,
    sum_over_batch,
    unsqueeze_channels,
    whole_batch,
)

# Where abs(mean) > _SHIFT_ABOVE * std, sums of x times something lose digits to the mean: the relative error
# of m2 is 1e-5 at a ratio of 10 and 1e-3 at 100. Sums of x - mean do not.
_SHIFT_ABOVE = 10.0

# A tensor of more elements does not fit into a cache. It is better not read twice; and if a second pass
# follows on the result of a first, both are better made in parts of this size.
_IN_CACHE = 2**21

# So many halves at once become float32: they and their results fit into a core's own cache.
_HALVES_AT_ONCE = 2**18

# Of a tensor of up to so many elements, a pass takes no longer than calls on vectors do.
_FEW = 2**15

_forward_out = torch.ops.aten.native_batch_norm.out
_backward = torch.ops.aten.native_batch_norm_backward.default


class CpuKernels:
    """`Kernels` on the CPU."""

    joins_small_batches = True
    normalizes_in_replicas = True

    def laid_out(self, x: Tensor) -> Tensor:
        """Return ``x``: every layout works."""
        return x

    def local_statistics(self, x: Tensor, eps: float) -> Statistics:
        """Return mean and m2."""
        count = samples_per_channel(x)
        if count == 0:
            mean = x.new_zeros(x.shape[1], dtype=compute_dtype(x.dtype))
            return mean, mean
        return mean_and_m2(x, count)

    def merge(self, parts: Sequence[Statistics], counts: Sequence[int], how: Reduction) -> WholeBatch:
        """Merge in float64, or, in the usual case, in the dtype of the arithmetic."""
        count = sum(counts)
        total: int | Tensor = count
        if len(parts) == 1:
            mean, m2 = parts[0]
        elif how.processes is None and len(set(counts)) == 1 and all(m.dtype == how.dtype for m, _ in parts):
            # The usual case, in few calls, because all replicas wait for them.
            means, m2s = zip(*parts)
            var, mean = torch.var_mean(torch.stack(means), 0, correction=0)
            m2 = torch.stack(m2s).sum(0).add_(var, alpha=count)
        else:
            mean, m2 = merge_statistics([(mean.double(), m2.double()) for mean, m2 in parts], counts)
        if how.processes is not None:
            mean, m2, total = how.processes.merge(mean, m2, count)
        return whole_batch(mean, m2, total, count, how)

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return ``(x - mean) * invstd * weight + bias``, in one pass."""
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        return affine(x, mean, scale, None if bias is None else bias.to(invstd.dtype), out)

    def gradient_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of ``dy`` and of ``dy * (x - mean)``, in one pass."""
        return gradient_sums(dy, x, mean)

    def input_gradient(self, dy: Tensor | None, x: Tensor, given: InputGradient) -> Tensor:
        """Return ``dx``, in two passes."""
        scale, slope, shift = affine_coefficients(given)
        if dy is None or x.numel() == 0:
            return affine(x, given.mean, slope, shift)
        if x.dtype != scale.dtype:
            return _half_input_gradient(dy, x, given.mean, scale, slope, shift)
        scale = unsqueeze_channels(scale, x)
        if x.numel() <= _IN_CACHE or not x.is_contiguous():
            return affine(x, given.mean, slope, shift).addcmul_(dy, scale)
        dx = torch.empty_like(x)
        for dy_part, x_part, dx_part in _in_parts(_IN_CACHE, dy, x, dx):
            affine(x_part, given.mean, slope, shift, out=dx_part).addcmul_(dy_part, scale)
        return dx


def _half_input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, shift: Tensor
) -> Tensor:
    """Return ``dy * scale + (x - mean) * slope + shift``, rounded to halves once, at the end."""
    dx = torch.empty_like(x)
    scale = unsqueeze_channels(scale, x)
    for dy_part, x_part, dx_part in _in_parts(_HALVES_AT_ONCE, dy, x, dx):
        wide = x_part.to(scale.dtype)
        affine(wide, mean, slope, shift, out=wide).addcmul_(dy_part.to(scale.dtype), scale)
        dx_part.copy_(wide)
    return dx


def _in_parts(elements: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield a few samples of each tensor after the other, if possible no more than so many elements."""
    samples = max(1, elements * len(tensors[0]) // tensors[0].numel())
    return zip(*(torch.split(tensor, samples) for tensor in tensors))


def mean_and_m2(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 of a batch of ``count`` samples per channel, at least 1.

    Their dtype is that of the arithmetic, or float64 if that does not have enough digits.
    """
    dtype = compute_dtype(x.dtype)
    if x.dtype == dtype and x.is_contiguous() and x.numel() > _FEW:
        found = _mean_and_m2_in_one_pass(x, count) if x.numel() > _IN_CACHE else None
        if found is not None:
            return found
        mean = sum_over_batch(x).div_(count)
        m2 = gradient_sums(x, x, mean)[1]
    else:
        # The kernel returns float32 statistics of half inputs only if there are running statistics in
        # float32.
        running = None if x.dtype == dtype else torch.zeros(x.shape[1], dtype=dtype)
        mean, var = torch.batch_norm_update_stats(x, running, running, 0.0)
        m2 = var.mul_(count)
    if _is_far(mean, m2, count):
        # By plain sums, which lose no digits. The kernels' own sums do, on channels_last.
        return local_statistics(x)
    return mean, m2


def _is_far(mean: Tensor, m2: Tensor, count: int) -> bool:
    """Whether any channel's mean is far from 0, in units of its standard deviation."""
    # A channel with a NaN counts as far: the minimum is NaN then, and would hide the others.
    return not torch.addcmul(m2, mean, mean, value=-count / _SHIFT_ABOVE**2).min().item() >= 0


def _mean_and_m2_in_one_pass(x: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Return mean and m2 from sums around the first sample's mean; None if that is too far from the mean.

    This is for inputs that do not fit into a cache. A second pass over a cache costs little.
    """
    center = sum_over_batch(x[:1]).mul_(len(x) / count)
    total, sum_of_products = gradient_sums(x, x, center)  # of x * (x - center)
    mean = total / count
    excess = (mean - center).mul_(total)
    m2 = sum_of_products - excess
    # The digits that m2 has lost to the mean, and to this difference.
    return None if _is_far(mean, m2 - excess.abs_(), count) else (mean, m2)


def affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return ``(x - mean) * scale + shift`` in one pass, in the shape, dtype and layout of ``x``.

    Args:
        x: ``(N, C, *)``.
        mean: ``(C,)``.
        scale: ``(C,)``.
        shift: ``(C,)``, or None for 0.
        out: the tensor for the result; None makes a new one.
    """
    if out is None:
        out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    if not is_dense(x):
        return out.copy_(
            torch.native_batch_norm(x, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]
        )
    if x.numel() > _FEW and x.dtype == scale.dtype and not x.is_contiguous():
        # Faster than a batch norm if the channels of a sample are adjacent in memory.
        constant = -mean * scale if shift is None else torch.addcmul(shift, mean, scale, value=-1)
        constant, scale = unsqueeze_channels(constant, x), unsqueeze_channels(scale, x)
        return torch.addcmul(constant, x, scale, out=out)
    # Torch's batch norm in evaluation mode.
    unused, var = mean.new_empty(0), torch.ones_like(mean)
    _forward_out(x, scale, shift, mean, var, False, 0.0, 0.0, out=out, save_mean=unused, save_invstd=unused)
    return out


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of ``dy`` and of ``dy * (x - mean)``, ``(C,)`` each, in one pass.

    These are the gradients of bias and weight of a batch norm in evaluation mode with a variance of 1.
    """
    if x.numel() == 0:  # the kernel divides by the number of samples, which would end the process
        return torch.zeros_like(mean), torch.zeros_like(mean)
    var = torch.ones_like(mean)
    _, sum_dy_xmu, sum_dy = _backward(dy, x, None, mean, var, None, None, False, 0.0, [False, True, True])
    if dy.dtype != mean.dtype and not (dy.stride() == x.stride() and is_dense(x)):
        # For half inputs in other layouts, this kernel rounds the sum to half precision.
        sum_dy = sum_over_batch(dy.to(mean.dtype))
    return sum_dy, sum_dy_xmu


def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Normalize a batch that is in one tensor, in training.

    Args:
        x: ``(N, C, *)``, at least 2 samples per channel.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.

    Returns:
        y; mean, unbiased variance and ``1 / sqrt(biased variance + eps)``, ``(C,)`` each in the dtype of the
        arithmetic. None if a mean is so far from 0 that they need more digits.
    """
    dtype = compute_dtype(x.dtype)
    # torch's own kernel computes the statistics of a contiguous batch in one thread, 1.6 ns per element. For
    # few elements this takes less time than the calls that it saves.
    if x.dtype != dtype or not x.is_contiguous() or x.numel() <= _FEW:
        mean, unbiased_var = torch.zeros(2, x.shape[1], dtype=dtype).unbind()
        y, _, invstd = torch.native_batch_norm(x, weight, bias, mean, unbiased_var, True, 1.0, eps)
        return None if _is_far(mean, unbiased_var, 1) else (y, mean, unbiased_var, invstd)
    count = samples_per_channel(x)
    mean, m2 = mean_and_m2(x, count)
    if mean.dtype != dtype:
        return None
    var = m2 / count
    y = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
    return y, mean, m2 / (count - 1), var.add_(eps).rsqrt_()


def train_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, whole: WholeBatch, eps: float, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias, each if it is wanted, of the result of `train_forward`."""
    mean, invstd, *_ = whole
    dx, dweight, dbias = _backward(dy, x, weight, None, None, mean, invstd, True, eps, list(wanted))
    return dx, dweight, dbias
