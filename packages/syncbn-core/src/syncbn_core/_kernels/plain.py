"""The kernels by plain operations, for devices without kernels of their own: the specification of the others.

All of them are pure functions without in-place changes, so they also run under ``torch.vmap``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from syncbn_core._kernels import statistics
from syncbn_core._kernels.protocol import InputGradient, Reduction, Statistics, WholeBatch
from syncbn_core._kernels.statistics import (
    compute_dtype,
    merge_statistics,
    sum_over_batch,
    unsqueeze_channels,
    whole_batch,
)


class PlainKernels:
    """`Kernels` by plain operations."""

    joins_small_batches = False
    normalizes_in_replicas = False

    def laid_out(self, x: Tensor) -> Tensor:
        """Return ``x``: every layout works."""
        return x

    def local_statistics(self, x: Tensor, eps: float) -> Statistics:
        """Return mean and m2; see :func:`syncbn_core._kernels.statistics.local_statistics`."""
        return statistics.local_statistics(x)

    def merge(self, parts: Sequence[Statistics], counts: Sequence[int], how: Reduction) -> WholeBatch:
        """Merge in the wide dtype of the parts."""
        (mean, m2), count = merge_statistics(parts, counts), sum(counts)
        total: int | Tensor = count
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
        """Return ``(x - mean) * invstd * weight + bias``, computed in at least float32."""
        y = normalize(x, mean, invstd, weight, bias).to(x.dtype)
        return y if out is None else out.copy_(y)

    def gradient_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of ``dy`` and of ``dy * (x - mean)``."""
        dy, x = dy.to(mean.dtype), x.to(mean.dtype)
        return sum_over_batch(dy), sum_over_batch(dy * (x - unsqueeze_channels(mean, x)))

    def input_gradient(self, dy: Tensor | None, x: Tensor, given: InputGradient) -> Tensor:
        """Return ``dx``."""
        scale, slope, shift = affine_coefficients(given)
        wide = x.to(scale.dtype)
        dx = (wide - unsqueeze_channels(given.mean, x)) * unsqueeze_channels(slope, x)
        dx = dx + unsqueeze_channels(shift, x)
        if dy is not None:
            dx = dx + dy.to(scale.dtype) * unsqueeze_channels(scale, x)
        return dx.to(x.dtype)


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``(x - mean) * invstd * weight + bias`` in at least float32.

    Args:
        x: ``(N, C, *)``.
        mean: ``(C,)``.
        invstd: ``(C,)``, the reciprocal of the standard deviation.
        weight: ``(C,)``, or None for 1.
        bias: ``(C,)``, or None for 0.

    Returns:
        ``(N, C, *)``, in the dtype of the arithmetic.
    """
    dtype = compute_dtype(x.dtype)
    scale = invstd.to(dtype) if weight is None else invstd.to(dtype) * weight.to(dtype)
    y = (x.to(dtype) - unsqueeze_channels(mean.to(dtype), x)) * unsqueeze_channels(scale, x)
    if bias is not None:
        y = y + unsqueeze_channels(bias.to(dtype), x)
    return y


def affine_coefficients(given: InputGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, slope and shift, ``(C,)`` each, for ``dx = dy * scale + (x - mean) * slope + shift``."""
    scale = given.invstd
    if given.weight is not None:
        scale = scale * given.weight.to(scale.dtype)
    share = scale / -given.samples
    slope = given.sum_dy_xmu * given.invstd * given.invstd * share
    return scale, slope, given.sum_dy * share
