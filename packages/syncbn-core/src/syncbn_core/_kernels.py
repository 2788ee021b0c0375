"""Torch's own batch-norm kernels, called by what they compute rather than by what they are named.

Four passes over big tensors, each for the CPU, for CUDA, and by plain operations for any other device:

================  =====================================  =============================
pass              reads -> writes                        in
================  =====================================  =============================
local_statistics  x -> mean, m2                          forward, where data enters
normalize         x -> y                                 forward, where data leaves
gradient_sums     dy, x -> two sums                      backward, where dy enters
input_gradient    dy, x -> dx                            backward, where dx leaves
================  =====================================  =============================

None of them synchronizes host and device on CUDA.

All arithmetic on vectors of length C beyond that is done once for all replicas, in the wide dtype in which
statistics are merged: `forward_vectors` and `backward_vectors` prepare what each replica's pass over its own
batch takes.

Autograd wants a gradient in the shape of what it is the gradient of. So whatever goes from node to node, as a
gradient or not, has `_ROWS` rows; the last one that means something fills what is left.
"""

import torch
from torch import Tensor

from . import _statistics
from ._statistics import compute_dtype, merge_dtype, samples_per_channel, sum_over_batch, unsqueeze_channels

# Where abs(mean) > _SHIFT_ABOVE * std, sums of x times something lose digits to the mean: the relative error
# of m2 is 1e-5 at a ratio of 10 and 1e-3 at 100. Sums of x - mean do not.
_SHIFT_ABOVE = 10.0

DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)

# Elements of a tensor beyond which a pass over it is better not made twice, and of which one is better made
# in parts of that size if another follows on its result.
_IN_CACHE = 2**21

# Elements of a tensor up to which calls on vectors count beside a pass over it.
_FEW = 2**15

_ROWS = 5

_cpu_forward_out = torch.ops.aten.native_batch_norm.out
cpu_backward = torch.ops.aten.native_batch_norm_backward.default


def _packed(*vectors: Tensor) -> Tensor:
    """``(_ROWS, C)``: the vectors, the last one repeated."""
    return torch.stack([*vectors, *vectors[-1:] * (_ROWS - len(vectors))])


def local_statistics(x: Tensor) -> Tensor:
    """Mean, m2, ...: as :func:`syncbn_core._statistics.local_statistics`, but packed."""
    count = samples_per_channel(x)
    if count == 0:
        return torch.zeros(_ROWS, x.shape[1], dtype=merge_dtype(x.device), device=x.device)
    if x.is_cpu:
        mean, m2 = mean_and_m2(x, count)
    elif x.is_cuda:
        mean, m2 = _cuda_mean_and_m2(x, count)
    else:
        mean, m2 = _statistics.local_statistics(x).unbind()
    return _packed(mean, m2).to(merge_dtype(x.device))


def mean_and_m2(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and m2 of a batch on the CPU, of ``count`` samples per channel, at least 1.

    They are of the dtype of the arithmetic; or of float64 where that has not digits enough.
    """
    dtype = compute_dtype(x.dtype)
    if x.dtype == dtype and x.is_contiguous():
        found = _mean_and_m2_in_one_pass(x, count) if x.numel() > _IN_CACHE else None
        if found is not None:
            return found
        mean = sum_over_batch(x).div_(count)
        m2 = _cpu_gradient_sums(x, x, mean)[1]
    else:
        # Half inputs get statistics in float32 only if there are running statistics in float32.
        running = None if x.dtype == dtype else torch.zeros(x.shape[1], dtype=dtype)
        mean, var = torch.batch_norm_update_stats(x, running, running, 0.0)
        m2 = var.mul_(count)
    if _is_far(mean, m2, count):
        # Not the mean found above: on channels_last it may itself be far off.
        shift = sum_over_batch(x.to(dtype)) / count
        deviation = x.to(dtype) - unsqueeze_channels(shift, x)
        rest, m2 = _cpu_gradient_sums(deviation, deviation, torch.zeros_like(shift))
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
    total, sum_of_products = _cpu_gradient_sums(x, x, center)  # of x * (x - center)
    mean = total / count
    excess = (mean - center).mul_(total)
    m2 = sum_of_products - excess
    # How many digits m2 has lost to the mean, and to this difference.
    if torch.addcmul(m2, mean, mean, value=-count / _SHIFT_ABOVE**2).sub_(excess.abs_()).min().item() < 0:
        return None
    return mean, m2


def cpu_forward(
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
    # Of a contiguous batch torch's own kernel takes the statistics in one thread, 1.6 ns per element.
    if x.dtype != dtype or not x.is_contiguous():
        mean, unbiased_var = torch.zeros(2, x.shape[1], dtype=dtype).unbind()
        y, _, invstd = torch.native_batch_norm(x, weight, bias, mean, unbiased_var, True, 1.0, eps)
        if not _is_far(mean, unbiased_var, 1):
            return y, mean, unbiased_var, invstd
    count = samples_per_channel(x)
    mean, m2 = mean_and_m2(x, count)
    if mean.dtype != dtype:
        return None
    var = m2 / count
    y = _cpu_evaluate(x, weight, bias, mean, var, eps)
    return y, mean, m2 / (count - 1), var.add_(eps).rsqrt_()


def _cuda_mean_and_m2(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # With eps = 0 the variance can be had back from the reciprocal of its root; of 1 / inf too.
    mean, invstd = torch.batch_norm_stats(x, 0.0)
    return mean, count / (invstd.double() * invstd.double())


def forward_vectors(
    mean: Tensor, invstd: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `normalize` and `gradient_sums` take, of all that has been agreed on.

    Args:
        mean: ``(C,)``, of the whole batch.
        invstd: ``(C,)``, the reciprocal of its standard deviation.
        scale: ``(C,)``, invstd times weight.
        bias: ``(C,)`` or None.
        dtype: of the arithmetic on x.

    Returns:
        In ``dtype``: mean; what its rounding to ``dtype`` has added to it; invstd; and the scale and shift
        with which y is ``x * scale + shift``.
    """
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return _packed(mean, mean.to(dtype) - mean, invstd, scale, shift).to(dtype)


def normalize(x: Tensor, vectors: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * invstd * weight + bias``.

    Args:
        x: ``(N, C, *)``.
        vectors: of `forward_vectors`, where weight and bias have gone in as well.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.

    Returns:
        y, as ``x`` in shape, dtype and layout.
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    mean, _, invstd, scale, shift = vectors.unbind()
    if x.is_cpu:
        return _cpu_affine(x, scale, shift)
    dtype = vectors.dtype
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)
    return _statistics.normalize(x, mean, invstd, weight, bias)


def _cpu_affine(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    """``x * scale + shift`` in one pass."""
    if _suits_addcmul(x, scale):
        return torch.addcmul(unsqueeze_channels(shift, x), x, unsqueeze_channels(scale, x), out=out)
    return _cpu_evaluate(x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), 0.0, out)


def _suits_addcmul(x: Tensor, vector: Tensor) -> bool:
    """Whether that is faster than a batch norm: where the channels of a sample lie side by side."""
    return x.dtype == vector.dtype and not x.is_contiguous() and is_dense(x)


def _cpu_evaluate(
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
    _cpu_forward_out(
        x, weight, bias, mean, var, False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused
    )
    return out


def cpu_normalize(
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
        return _cpu_evaluate(x, weight, bias, mean, var, eps, out)
    scale = (var + eps).rsqrt_()
    if weight is not None:
        scale.mul_(weight)
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return _cpu_affine(x, scale, shift, out)


def cpu_input_gradient(
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
        return cpu_normalize(x, slope, shift, mean, var, eps)
    scale = unsqueeze_channels(scale.to(x.dtype), x)
    if x.numel() <= _IN_CACHE or not x.is_contiguous():
        return cpu_normalize(x, slope, shift, mean, var, eps).addcmul_(dy, scale)
    # A few samples after the other, while a cache holds them.
    dx = torch.empty_like(x)
    samples = max(1, _IN_CACHE * len(x) // x.numel())
    for dy_part, x_part, dx_part in zip(*(torch.split(each, samples) for each in (dy, x, dx))):
        cpu_normalize(x_part, slope, shift, mean, var, eps, out=dx_part).addcmul_(dy_part, scale)
    return dx


def gradient_sums(dy: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """The sums of ``dy`` and of ``dy * (x - mean)`` over all but the channel axis, packed.

    Args:
        dy: ``(N, C, *)``.
        x: ``(N, C, *)``.
        vectors: of `forward_vectors`.
    """
    mean, rounding, invstd, _, _ = vectors.unbind()
    if x.numel() == 0:
        return torch.zeros_like(vectors)
    if x.is_cpu:
        sum_dy, sum_dy_xmu = _cpu_gradient_sums(dy, x, mean)
    elif x.is_cuda:
        reduce = torch.batch_norm_backward_reduce
        sum_dy, sum_dy_xmu = reduce(laid_out_as(x, dy), x, mean, invstd, None, True, False, False)[:2]
    else:
        dy, x = dy.to(mean.dtype), x.to(mean.dtype)
        sum_dy, sum_dy_xmu = sum_over_batch(dy), sum_over_batch(dy * (x - unsqueeze_channels(mean, x)))
    # The kernel took the mean rounded to its own dtype.
    return _packed(sum_dy, sum_dy_xmu.addcmul_(sum_dy, rounding))


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """``dy`` with the strides of ``x``, or a copy with them.

    The kernels for CUDA read both by one of the two layouts, and those for halves on the CPU are exact then.
    """
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _cpu_gradient_sums(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    return cpu_gradient_sums(dy, x, mean, torch.ones_like(mean), 0.0)


def cpu_gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sums of ``dy`` and of ``dy * (x - mean) / sqrt(var + eps)``, ``(C,)`` each.

    These are the gradients of bias and weight of a batch norm in evaluation mode. There has to be a sample:
    the kernel divides by their number, and would take the whole process along.
    """
    _, sum_dy_normalized, sum_dy = cpu_backward(
        dy, x, None, mean, var, None, None, False, eps, [False, True, True]
    )
    if dy.dtype != mean.dtype and not (dy.stride() == x.stride() and is_dense(x)):
        # Of halves in other layouts this kernel rounds the sum to a half.
        sum_dy = sum_over_batch(dy.to(mean.dtype))
    return sum_dy, sum_dy_normalized


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` has one of the layouts that the kernels are fast for."""
    return any(x.is_contiguous(memory_format=layout) for layout in DENSE)


def backward_vectors(
    mean: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What `input_gradient` takes to compute ``scale * (dy - shift - slope * (x - mean))``.

    Args:
        mean: ``(C,)``, of the whole batch.
        scale: ``(C,)``, as for `forward_vectors`.
        shift: ``(C,)``, the mean of dy.
        slope: ``(C,)``, of dy's regression on x.
        device: of x.
        dtype: of the arithmetic on x.

    Returns:
        Vectors, packed.
    """
    if device.type == "cpu":
        scaled = scale * slope
        constant = torch.addcmul(scaled * mean, scale, shift, value=-1)
        return _packed(scale, scaled.neg_(), constant)
    # What the rounding of the mean takes from x - mean goes into the shift.
    shift = torch.addcmul(shift, slope, mean.to(dtype) - mean)
    return _packed(scale, mean, shift, slope)


def input_gradient(dy: Tensor | None, x: Tensor, vectors: Tensor) -> Tensor:
    """What every replica's dx comes down to.

    Args:
        dy: ``(N, C, *)``, or None for zeros.
        x: ``(N, C, *)``.
        vectors: of `backward_vectors`.

    Returns:
        dx, as ``x`` in shape, dtype and layout.
    """
    if x.numel() == 0:
        return torch.empty_like(x)
    vectors = vectors.to(compute_dtype(x.dtype))
    if x.is_cpu:
        scale, slope, constant, _, _ = vectors.unbind()
        mean, var = torch.zeros_like(slope), torch.ones_like(slope)
        return cpu_input_gradient(dy, x, scale, slope, constant, mean, var, 0.0)
    scale, mean, shift, slope, _ = vectors.unbind()
    if dy is None:
        dy = torch.zeros_like(x)
    if x.is_cuda:
        # sum_dy / count and sum_dy_xmu * invstd**2 / count are what the kernel makes of its arguments.
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        ones = torch.ones_like(mean)
        return torch.batch_norm_backward_elemt(laid_out_as(x, dy), x, mean, ones, scale, shift, slope, one)
    scale, mean, shift, slope = (unsqueeze_channels(vector, x) for vector in (scale, mean, shift, slope))
    return (scale * (dy - shift - slope * (x - mean))).to(x.dtype)
