"""The arithmetic of synchronized statistics, as pure functions of plain tensors.

Everything here is differentiable and runs on any device: it is the specification that the fused kernels
are tested against, and the very code of the composite path (``fused=False``).

Statistics travel packed: a ``(3, C)`` tensor of the rows mean, m2 and count, where ``m2`` is the sum of
squared deviations from the mean. ``m2 / count`` is the biased variance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_HALF_TYPES = (torch.float16, torch.bfloat16)


def sum_over_batch(x: Tensor) -> Tensor:
    """Sum over every axis but the channel axis.

    Args:
        x: ``(N, C)`` or ``(N, C, *)``.

    Returns:
        ``(C,)``, in the dtype of ``x``.

    Example:
        >>> sum_over_batch(torch.ones(2, 3, 4, 4))
        tensor([32., 32., 32.])
    """
    return x.sum([axis for axis in range(x.dim()) if axis != 1])


def unsqueeze_channels(vector: Tensor, like: Tensor) -> Tensor:
    """View a ``(C,)`` vector so that it broadcasts against ``(N, C, *)``.

    Args:
        vector: ``(C,)``.
        like: ``(N, C, *)``; only its number of axes is read.

    Returns:
        A view of ``vector``: ``(1, C, 1, ...)``, with as many axes as ``like``.

    Example:
        >>> unsqueeze_channels(torch.zeros(3), torch.zeros(2, 3, 4, 4)).shape
        torch.Size([1, 3, 1, 1])
    """
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def samples_per_channel(x: Tensor) -> int:
    """How many values of ``x``, ``(N, C, *)``, each channel has."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on inputs of ``dtype``: at least float32."""
    return torch.float32 if dtype in _HALF_TYPES else dtype


def merge_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which vectors of length C are merged: float64 where the device has it.

    Rounding the mean of one replica to float32 alone costs 2e-3 of the variance at mean 1e6 and standard
    deviation 1, and C numbers cost nothing beside a pass over the input.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def local_statistics(x: Tensor) -> Tensor:
    """The statistics of one replica's batch.

    The sums are taken of ``x - shift``, where the shift is a rounded mean: then neither the rounding of the
    mean nor a mean far from 0 costs digits, as it would in the mean of squares minus the squared mean.

    Args:
        x: ``(N, C, *)``; N may be 0.

    Returns:
        ``(3, C)``: mean, m2 and count of every channel, in :func:`merge_dtype`.
    """
    count = samples_per_channel(x)
    n = max(count, 1)
    x = x.to(compute_dtype(x.dtype))
    shift = (sum_over_batch(x) / n).detach()
    deviation = x - unsqueeze_channels(shift, x)
    wide = merge_dtype(x.device)
    rest = sum_over_batch(deviation).to(wide) / n
    mean = shift.to(wide) + rest
    m2 = sum_over_batch(deviation**2).to(wide) - n * rest**2
    return torch.stack([mean, m2, torch.full_like(mean, count)])


def merge_statistics(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of several batches into those of their union, in the given order.

    Args:
        parts: ``(3, C)`` tensors of mean, m2 and count, on one device. Parts of count 0 change nothing.

    Returns:
        mean, m2 and count of the union, ``(C,)`` each; all 0 where every part is empty.

    Reference:
        T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances", 1979; here for any number of parts at once.

    Example:
        >>> a, b = torch.randn(4, 2), torch.randn(3, 2)
        >>> mean, m2, count = merge_statistics([local_statistics(a), local_statistics(b)])
        >>> torch.allclose(m2 / count, torch.cat([a, b]).double().var(0, correction=0))
        True
    """
    if len(parts) == 1:
        mean, m2, count = parts[0].unbind()
        return mean, m2, count
    return merge_stacked(*torch.stack(list(parts), 1).unbind())


def merge_stacked(means: Tensor, m2s: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_statistics` of ``(R, C)`` means and m2s, and ``(R, C)`` or ``(R, 1)`` counts."""
    count = counts.sum(0)
    # An empty union has the mean 0 rather than 0 / 0.
    mean = (counts * means).sum(0) / count.clamp(min=1)
    m2 = torch.addcmul(m2s, counts, (means - mean) ** 2).sum(0)
    return mean, m2, count.expand_as(mean)


def normalize(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``(x - mean) * invstd * weight + bias``, in at least float32, returned in the dtype of ``x``.

    Args:
        x: ``(N, C, *)``.
        mean: ``(C,)``.
        invstd: ``(C,)``, the reciprocal of the standard deviation.
        weight: ``(C,)``, or None for 1.
        bias: ``(C,)``, or None for 0.

    Returns:
        ``(N, C, *)``.
    """
    dtype = compute_dtype(x.dtype)
    scale = invstd.to(dtype) if weight is None else invstd.to(dtype) * weight.to(dtype)
    y = (x.to(dtype) - unsqueeze_channels(mean.to(dtype), x)) * unsqueeze_channels(scale, x)
    if bias is not None:
        y = y + unsqueeze_channels(bias.to(dtype), x)
    return y.to(x.dtype)
