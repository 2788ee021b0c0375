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

from . import _cpu, _statistics
from ._layouts import laid_out_as
from ._statistics import compute_dtype, merge_dtype, samples_per_channel, sum_over_batch, unsqueeze_channels

_ROWS = 5


def _packed(*vectors: Tensor) -> Tensor:
    """``(_ROWS, C)``: the vectors, the last one repeated."""
    return torch.stack([*vectors, *vectors[-1:] * (_ROWS - len(vectors))])


def local_statistics(x: Tensor) -> Tensor:
    """Mean, m2, ...: as :func:`syncbn_core._statistics.local_statistics`, but packed."""
    count = samples_per_channel(x)
    if count == 0:
        return torch.zeros(_ROWS, x.shape[1], dtype=merge_dtype(x.device), device=x.device)
    if x.is_cpu:
        mean, m2 = _cpu.mean_and_m2(x, count)
    elif x.is_cuda:
        mean, m2 = _cuda_mean_and_m2(x, count)
    else:
        mean, m2 = _statistics.local_statistics(x).unbind()
    return _packed(mean, m2).to(merge_dtype(x.device))


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
        return _cpu.affine(x, scale, shift)
    dtype = vectors.dtype
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.is_cuda:
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)
    return _statistics.normalize(x, mean, invstd, weight, bias)


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
        sum_dy, sum_dy_xmu = _cpu.gradient_sums(dy, x, mean)
    elif x.is_cuda:
        reduce = torch.batch_norm_backward_reduce
        sum_dy, sum_dy_xmu = reduce(laid_out_as(x, dy), x, mean, invstd, None, True, False, False)[:2]
    else:
        dy, x = dy.to(mean.dtype), x.to(mean.dtype)
        sum_dy, sum_dy_xmu = sum_over_batch(dy), sum_over_batch(dy * (x - unsqueeze_channels(mean, x)))
    # The kernel took the mean rounded to its own dtype.
    return _packed(sum_dy, sum_dy_xmu.addcmul_(sum_dy, rounding))


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
        return _cpu.input_gradient(dy, x, scale, slope, constant, mean, var, 0.0)
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
