"""Torch's own batch-norm kernels on the CPU, and which of them is the faster one.

============================  =====================================
pass                          reads -> writes
============================  =====================================
mean_and_m2                   x -> mean, m2
affine, normalize             x -> y
gradient_sums                 dy, x -> two sums
input_gradient                dy, x -> dx
train_forward                 x -> y, of a batch all in one place
============================  =====================================
"""

import torch
from torch import Tensor

from ._layouts import is_dense
from ._statistics import compute_dtype, samples_per_channel, sum_over_batch, unsqueeze_channels

# Where abs(mean) > _SHIFT_ABOVE * std, sums of x times something lose digits to the mean: the relative error
# of m2 is 1e-5 at a ratio of 10 and 1e-3 at 100. Sums of x - mean do not.
_SHIFT_ABOVE = 10.0

# Elements of a tensor beyond which a pass over it is better not made twice, and of which one is better made
# in parts of that size if another follows on its result.
_IN_CACHE = 2**21

# Elements of a tensor up to which calls on vectors count beside a pass over it.
_FEW = 2**15

_forward_out = torch.ops.aten.native_batch_norm.out
backward = torch.ops.aten.native_batch_norm_backward.default


def mean_and_m2(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and m2 of a batch on the CPU, of ``count`` samples per channel, at least 1.

    They are of the dtype of the arithmetic; or of float64 where that has not digits enough.
    """
    dtype = compute_dtype(x.dtype)
    if x.dtype == dtype and x.is_contiguous() and x.numel() > _FEW:
        found = _mean_and_m2_in_one_pass(x, count) if x.numel() > _IN_CACHE else None
        if found is not None:
            return found
        mean = sum_over_batch(x).div_(count)
        m2 = gradient_sums(x, x, mean)[1]
    else:
        # Half inputs get statistics in float32 only if there are running statistics in float32.
        running = None if x.dtype == dtype else torch.zeros(x.shape[1], dtype=dtype)
        mean, var = torch.batch_norm_update_stats(x, running, running, 0.0)
        m2 = var.mul_(count)
    if _is_far(mean, m2, count):
        # Not the mean found above: on channels_last it may itself be far off.
        shift = sum_over_batch(x.to(dtype)) / count
        deviation = x.to(dtype) - unsqueeze_channels(shift, x)
        rest, m2 = gradient_sums(deviation, deviation, torch.zeros_like(shift))
        rest = rest.double() / count
        return shift.double() + rest, m2.double() - count * rest * rest
    return mean, m2


def _is_far(mean: Tensor, m2: Tensor, count: int) -> bool:
    """Whether in any channel the mean is far from 0, seen from the standard deviation."""
    return torch.addcmul(m2, mean, mean, value=-count / _SHIFT_ABOVE**2).min().item() < 0


def _mean_and_m2_in_one_pass(x: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The same of sums around the mean of the first sample; None where that is too far from the mean.

    Not from memory but from a cache, a second pass costs little, so this is for inputs that no cache holds.
    """
    center = sum_over_batch(x[:1]).mul_(len(x) / count)
    total, sum_of_products = gradient_sums(x, x, center)  # of x * (x - center)
    mean = total / count
    excess = (mean - center).mul_(total)
    m2 = sum_of_products - excess
    # How many digits m2 has lost to the mean, and to this difference.
    return None if _is_far(mean, m2 - excess.abs_(), count) else (mean, m2)


def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The whole forward of a batch norm in training, for a batch on the CPU that is all in one place.

    Args:
        x: ``(N, C, *)``, at least 2 samples per channel.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.

    Returns:
        y, as ``x`` in shape, dtype and layout; mean; unbiased variance; and 1 / sqrt(biased variance + eps).
        None if a mean is so far from 0 that these need more digits than the dtype of the arithmetic has.
    """
    dtype = compute_dtype(x.dtype)
    # Of a contiguous batch torch's own kernel takes the statistics in one thread, 1.6 ns per element; of few
    # that is less than the calls that it saves.
    if x.dtype != dtype or not x.is_contiguous() or x.numel() <= _FEW:
        mean, unbiased_var = torch.zeros(2, x.shape[1], dtype=dtype).unbind()
        y, _, invstd = torch.native_batch_norm(x, weight, bias, mean, unbiased_var, True, 1.0, eps)
        if not _is_far(mean, unbiased_var, 1):
            return y, mean, unbiased_var, invstd
    count = samples_per_channel(x)
    mean, m2 = mean_and_m2(x, count)
    if mean.dtype != dtype:
        return None
    var = m2 / count
    y = _evaluate(x, weight, bias, mean, var, eps)
    return y, mean, m2 / (count - 1), var.add_(eps).rsqrt_()


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` in one pass.

    Args:
        x: ``(N, C, *)``.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        mean: ``(C,)``.
        var: ``(C,)``.
        eps: added to the variance.
        out: where to write the result, as ``x`` in shape, dtype and layout, if it is not to be a new tensor.
    """
    if x.numel() <= _FEW or not _suits_addcmul(x, mean):
        return _evaluate(x, weight, bias, mean, var, eps, out)
    scale = (var + eps).rsqrt_()
    if weight is not None:
        scale.mul_(weight)
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return affine(x, scale, shift, out)


def affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """``x * scale + shift`` in one pass."""
    if _suits_addcmul(x, scale):
        return torch.addcmul(unsqueeze_channels(shift, x), x, unsqueeze_channels(scale, x), out=out)
    return _evaluate(x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), 0.0, out)


def _suits_addcmul(x: Tensor, vector: Tensor) -> bool:
    """Whether that is faster than a batch norm: where the channels of a sample lie side by side."""
    return x.dtype == vector.dtype and not x.is_contiguous() and is_dense(x)


def _evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Torch's batch norm in evaluation mode."""
    if out is None:
        y: Tensor = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return y
    unused = mean.new_empty(0)
    _forward_out(x, weight, bias, mean, var, False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused)
    return out


def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sums of ``dy`` and of ``dy * (x - mean) / sqrt(var + eps)``, ``(C,)`` each; without var, of 1.

    These are the gradients of bias and weight of a batch norm in evaluation mode. There has to be a sample:
    the kernel divides by their number, and would take the whole process along.
    """
    if var is None:
        var = torch.ones_like(mean)
    _, sum_dy_normalized, sum_dy = backward(
        dy, x, None, mean, var, None, None, False, eps, [False, True, True]
    )
    if dy.dtype != mean.dtype and not (dy.stride() == x.stride() and is_dense(x)):
        # Of halves in other layouts this kernel rounds the sum to a half.
        sum_dy = sum_over_batch(dy.to(mean.dtype))
    return sum_dy, sum_dy_normalized


def input_gradient(
    dy: Tensor | None,
    x: Tensor,
    scale: Tensor,
    slope: Tensor,
    shift: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """``dy * scale + (x - mean) / sqrt(var + eps) * slope + shift``; the vectors are ``(C,)`` each."""
    if dy is None:
        return normalize(x, slope, shift, mean, var, eps)
    scale = unsqueeze_channels(scale.to(x.dtype), x)
    if x.numel() <= _IN_CACHE or not x.is_contiguous():
        return normalize(x, slope, shift, mean, var, eps).addcmul_(dy, scale)
    # A few samples after the other, while a cache holds them.
    dx = torch.empty_like(x)
    samples = max(1, _IN_CACHE * len(x) // x.numel())
    for dy_part, x_part, dx_part in zip(*(torch.split(each, samples) for each in (dy, x, dx))):
        normalize(x_part, slope, shift, mean, var, eps, out=dx_part).addcmul_(dy_part, scale)
    return dx
