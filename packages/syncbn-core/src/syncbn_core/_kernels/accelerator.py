"""The kernels of accelerators: cuda, xpu, hpu and devices of torch's PrivateUse1 slot.

The cost here is kernel launches; it is even worse if the host waits for a device. So every function launches
as few kernels as it can, and none reads a device's memory on the host. torch's merge kernel merges the
statistics of all replicas and updates the running statistics in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from syncbn_core._kernels.layouts import is_dense, laid_out_as
from syncbn_core._kernels.protocol import (
    InputGradient,
    Processes,
    Reduction,
    RunningStatistics,
    Statistics,
    WholeBatch,
)
from syncbn_core._kernels.statistics import (
    check_total,
    compute_dtype,
    counted_by_devices,
    samples_per_channel,
)
from syncbn_core._kernels.streams import current_stream, is_capturing

# torch's merge kernel divides by a running count, so a first count of 0 gives NaN. A count this small has no
# effect on the result.
_NOTHING = 1e-30

# The largest count that one element of an int32 tensor gets.
_MAX_COUNT = 2**30


class AcceleratorKernels:
    """`Kernels` on accelerators. The second of the two statistics is ``invstd``."""

    joins_small_batches = False
    normalizes_in_replicas = False

    def laid_out(self, x: Tensor) -> Tensor:
        """Return ``x``, or a contiguous copy if it is neither contiguous nor channels_last."""
        return x if is_dense(x) else x.contiguous()

    def local_statistics(self, x: Tensor, eps: float) -> Statistics:
        """Return mean and ``1 / sqrt(var + eps)``."""
        if samples_per_channel(x) == 0:
            mean = x.new_zeros(x.shape[1], dtype=compute_dtype(x.dtype))
            return mean, torch.ones_like(mean)
        mean, invstd = torch.batch_norm_stats(x, eps)
        return mean, invstd

    def merge(self, parts: Sequence[Statistics], counts: Sequence[int], how: Reduction) -> WholeBatch:
        """Merge in the dtype of the arithmetic; the parts have been rounded to it already."""
        count = sum(counts)
        if how.processes is None:
            check_total(count, how.name)
            if count == 0:  # nothing to learn from, nothing to normalize
                mean, invstd = parts[0]
                return WholeBatch(mean, invstd, 0)
            means, invstds = (torch.stack(each) for each in zip(*parts))
            return _finish(means, invstds, constant(counts, how.dtype, means.device), count, how)
        mean, invstd = parts[0]
        if len(parts) > 1:
            means, invstds = (torch.stack(each) for each in zip(*parts))
            own_counts = constant(counts, how.dtype, means.device)
            mean, invstd = _merged(means, invstds, None, 0.0, how.eps, own_counts)
        own_count = constant([count], how.dtype, mean.device)
        if how.processes.are_many:
            means, invstds, all_counts = _summed(mean, invstd, own_count, how.eps, how.processes)
        else:
            rows = how.processes.gather(torch.cat([mean, invstd, own_count]))  # (P, 2C + 1)
            n = len(mean)
            means, invstds, all_counts = rows[:, :n], rows[:, n:-1], rows[:, -1]
        total = all_counts.round().sum() if count < 2 else all_counts
        with counted_by_devices(total, count, how):
            return _finish(means, invstds, all_counts, None, how)

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return ``(x - mean) * invstd * weight + bias``."""
        if x.numel() == 0:
            return torch.empty_like(x)
        y: Tensor = torch.batch_norm_elemt(x, weight, bias, mean, invstd, 0.0)
        return y if out is None else out.copy_(y)

    def gradient_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of ``dy`` and of ``dy * (x - mean)``."""
        if x.numel() == 0:
            return torch.zeros_like(mean), torch.zeros_like(mean)
        reduce = torch.batch_norm_backward_reduce
        sum_dy, sum_dy_xmu, _, _ = reduce(laid_out_as(x, dy), x, mean, invstd, None, True, False, False)
        return sum_dy, sum_dy_xmu

    def input_gradient(self, dy: Tensor | None, x: Tensor, given: InputGradient) -> Tensor:
        """Return ``dx``."""
        if x.numel() == 0:
            return torch.empty_like(x)
        mean, invstd, weight, sum_dy, sum_dy_xmu, samples = given
        dy = torch.zeros_like(x) if dy is None else laid_out_as(x, dy)
        weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        if not isinstance(samples, Tensor):
            pieces = [_MAX_COUNT] * (samples // _MAX_COUNT) + [samples % _MAX_COUNT]
            samples = constant(pieces, torch.int32, x.device)
        dx: Tensor = torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, samples)
        return dx


def _merged(
    means: Tensor,
    invstds: Tensor,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> Statistics:
    """Merge ``(R, C)`` means and invstds of ``(R,)`` counts, and update the running statistics."""
    running_mean, running_var = running or (None, None)
    # The kernel reads only the dtype of its first argument, which has to be that of the counts.
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        means, means, invstds, running_mean, running_var, momentum, eps, counts
    )
    return mean, invstd


def _finish(means: Tensor, invstds: Tensor, counts: Tensor, count: int | None, how: Reduction) -> WholeBatch:
    """Do the last merge.

    Args:
        means: ``(R, C)``, of replicas or processes.
        invstds: ``(R, C)``.
        counts: ``(R,)``, in the dtype of the arithmetic.
        count: their sum, where the host knows it.
        how: the layer's options for the reduction.
    """
    number: int | Tensor = counts.to(torch.int32) if count is None else count
    running = how.running
    if how.is_standard and _fits(running, means.dtype):
        moved = None if running is None else (running.mean, running.var)
        momentum = 0.0 if running is None or running.momentum is None else running.momentum
        mean, invstd = _merged(means, invstds, moved, momentum, how.eps, counts)
        if running is not None and running.num_batches_tracked is not None:
            running.num_batches_tracked.add_(1)
        return WholeBatch(mean, invstd, number)
    # With a momentum of 1 the kernel writes mean and unbiased variance themselves.
    mean, unbiased_var = torch.zeros(2, means.shape[1], dtype=means.dtype, device=means.device).unbind()
    _merged(means, invstds, (mean, unbiased_var), 1.0, how.eps, counts)
    total: int | Tensor = counts.sum().view(1) if count is None else count
    m2 = unbiased_var * (total - 1)
    is_floor = (m2 < how.eps * total) if how.clamps else None
    mean, invstd = how.finish(mean, m2, total)
    return WholeBatch(mean.to(means.dtype), invstd.to(means.dtype), number, is_floor=is_floor)


def _fits(running: RunningStatistics | None, dtype: torch.dtype) -> bool:
    """Whether the merge kernel can update these running statistics."""
    if running is None:
        return True
    return running.momentum is not None and running.mean.dtype == running.var.dtype == dtype


def _summed(
    mean: Tensor, invstd: Tensor, count: Tensor, eps: float, processes: Processes
) -> tuple[Tensor, Tensor, Tensor]:
    """Add count, sum and sum of squares of all processes, in float64; return them as one part, ``(1, C)``.

    The relative error of the variance is 1e-16 times the squared ratio of mean and standard deviation.
    """
    wide_mean = mean.double()
    square = invstd.double().pow_(-2).addcmul_(wide_mean, wide_mean)  # of x, and eps
    wide_count = count.double()
    total = processes.add(torch.cat([torch.cat([wide_mean, square]).mul_(wide_count), wide_count]))
    wide_mean, square = (total[:-1] / total[-1:]).view(2, -1).unbind()
    var = square.addcmul_(wide_mean, wide_mean, value=-1).clamp_(min=eps)
    return wide_mean.to(mean.dtype)[None], var.rsqrt_().to(mean.dtype)[None], total[-1:].to(mean.dtype)


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the values as a tensor, with `_NOTHING` for 0 if the dtype has it; do not change it in place.

    The tensor is kept for the next call. It belongs to the current stream, so each stream has its own. A CUDA
    graph gets a new one, since a tensor that is made during a capture belongs to that graph.
    """
    kept = tuple(values)
    if is_capturing(device):
        return _new_constant(kept, dtype, device)
    return _kept_constant(kept, dtype, device, getattr(current_stream(device), "stream_id", None))


def _new_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype.is_floating_point:
        values = tuple(value or _NOTHING for value in values)
    # Written by the device: the host would wait for a copy of host memory.
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=dtype, device=device)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


@lru_cache(maxsize=256)
def _kept_constant(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int | None
) -> Tensor:
    with torch.inference_mode(False):
        return _new_constant(values, dtype, device)
