"""The arithmetic of synchronized statistics, as pure functions of plain tensors.

Everything here is differentiable and runs on any device. It is the specification that the fused kernels are
tested against, and the code of the composite path (``fused=False``).

The statistics of a batch are its ``mean`` and its ``m2``, the sum of squared deviations from the mean;
``m2 / count`` is the biased variance. The count is a number that the host knows, or, over several processes,
a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from syncbn_core._kernels.protocol import Reduction, Statistics, WholeBatch

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
    """Return how many values of ``x``, ``(N, C, *)``, each channel has."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def check_total(count: int, name: str) -> None:
    """Raise ValueError if there is one value per channel in all replicas; ``name`` is the layer's."""
    if count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 in all replicas together at "
            f"{name!r}"
        )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic on inputs of ``dtype``: at least float32."""
    return torch.float32 if dtype in _HALF_TYPES else dtype


def merge_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which vectors of length C are merged: float64 where the device has it.

    Rounding the mean of one replica to float32 alone costs 2e-3 of the variance at mean 1e6 and standard
    deviation 1, and C numbers cost nothing beside a pass over the input.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def local_statistics(x: Tensor) -> Statistics:
    """Return the statistics of one replica's batch.

    The sums are those of ``x - shift``, where the shift is a rounded mean. So no digits are lost, neither to
    the rounding of the mean nor to a mean far from 0, unlike in the mean of squares minus the squared mean.

    Args:
        x: ``(N, C, *)``; N may be 0.

    Returns:
        mean and m2 of every channel, ``(C,)`` each, in :func:`merge_dtype`.
    """
    n = max(samples_per_channel(x), 1)
    x = x.to(compute_dtype(x.dtype))
    shift = (sum_over_batch(x) / n).detach()
    deviation = x - unsqueeze_channels(shift, x)
    wide = merge_dtype(x.device)
    rest = sum_over_batch(deviation).to(wide) / n
    return shift.to(wide) + rest, sum_over_batch(deviation**2).to(wide) - n * rest**2


def merge_statistics(parts: Sequence[Statistics], counts: Sequence[int]) -> Statistics:
    """Merge the statistics of several batches into those of their union, in the given order.

    Args:
        parts: mean and m2 of each batch, ``(C,)`` each, all on one device.
        counts: the number of samples of each. An empty batch changes nothing.

    Returns:
        mean and m2 of the union, ``(C,)`` each; 0 where every part is empty.

    Reference:
        T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances", 1979.

    Example:
        >>> a, b = torch.randn(4, 2), torch.randn(3, 2)
        >>> mean, m2 = merge_statistics([local_statistics(a), local_statistics(b)], [4, 3])
        >>> torch.allclose(m2 / 7, torch.cat([a, b]).double().var(0, correction=0))
        True
    """
    mean, m2 = parts[0]
    merged = counts[0]
    for (part_mean, part_m2), count in zip(parts[1:], counts[1:]):
        if count == 0:
            continue
        total = merged + count
        delta = part_mean - mean
        mean = torch.add(mean, delta, alpha=count / total)
        m2 = torch.addcmul(m2 + part_m2, delta, delta, value=merged * count / total)
        merged = total
    return mean, m2


def merge_stacked(means: Tensor, m2s: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_statistics` of ``(P, C)`` means and m2s and ``(P, 1)`` counts; and the sum of the counts."""
    count = counts.sum(0)
    # An empty union has the mean 0 rather than 0 / 0.
    mean = (counts * means).sum(0) / count.clamp(min=1)
    deviations = means - mean
    m2 = torch.addcmul(m2s, counts * deviations, deviations).sum(0)
    return mean, m2, count


@contextmanager
def counted_by_devices(count: int | Tensor, own_count: int, how: Reduction) -> Iterator[None]:
    """Check a count that only the devices know; the host does not wait.

    If this process has two samples, no check is needed. If it has one, the devices assert that there are
    more. If it has none, all processes may have none: then the running statistics stay as they are.

    Args:
        count: the number of samples of all processes, ``(1,)`` or ``()``; a number is not checked.
        own_count: the number of samples of the replicas of this process.
        how: the layer's options for the reduction.
    """
    if not isinstance(count, Tensor) or own_count > 1:
        yield
        return
    if own_count == 1:
        torch._assert_async((count > 1).squeeze(), f"Expected more than 1 value per channel at {how.name!r}")
    moved = [] if how.running is None else [*how.running.tensors()]
    before = [tensor.clone() for tensor in moved]
    yield
    for tensor, old in zip(moved, before):
        tensor.copy_(torch.where(count > 0, tensor, old).view(tensor.shape))


def whole_batch(mean: Tensor, m2: Tensor, count: int | Tensor, own_count: int, how: Reduction) -> WholeBatch:
    """Turn merged statistics into those to normalize with, and update the running statistics.

    Args:
        mean: ``(C,)``, of all replicas of all processes.
        m2: ``(C,)``, of all replicas of all processes.
        count: their number of samples.
        own_count: the number of samples of the replicas of this process.
        how: the layer's options for the reduction.
    """
    dtype = how.dtype
    if isinstance(count, int) or count.is_cpu:
        count = int(count)
        check_total(count, how.name)
        if count == 0:  # nothing to learn from, nothing to normalize
            return WholeBatch(mean.to(dtype), torch.ones_like(mean, dtype=dtype), 0)
    is_floor = (m2 < how.eps * count) if how.clamps else None
    with counted_by_devices(count, own_count, how):
        wide_mean, wide_invstd = how.finish(mean, m2, count)
    mean, invstd = wide_mean.to(dtype), wide_invstd.to(dtype)
    rounding = None if wide_mean.dtype == dtype else (mean - wide_mean).to(dtype)
    return WholeBatch(mean, invstd, count, rounding, is_floor)
