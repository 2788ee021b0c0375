"""The protocol of the kernels: what each kind of device has to compute, and in which form.

::

    forward, every replica      x                        -> local_statistics -> statistics
    forward, once               statistics of all        -> merge            -> WholeBatch, running statistics
    forward, every replica      x, WholeBatch            -> normalize        -> y
    backward, every replica     dy, x, WholeBatch        -> gradient_sums    -> sum_dy, sum_dy_xmu
    backward, every replica     dy, x, sums of all       -> input_gradient   -> dx
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor]
"""The statistics of one replica's batch, ``(C,)`` each: mean and m2, or, on accelerators, mean and invstd."""

Finish = Callable[[Tensor, Tensor, "int | Tensor"], tuple[Tensor, Tensor]]
"""(mean, m2, count) of the whole batch -> (mean, invstd) to normalize with; updates running statistics."""


class WholeBatch(NamedTuple):
    """The statistics of the whole batch.

    Attributes:
        mean: ``(C,)``, in the dtype of the arithmetic.
        invstd: ``(C,)``, the reciprocal of the standard deviation, in the same dtype.
        samples: the number of samples per channel; on accelerators, where only the devices know it, an int32
            tensor of the counts of all processes, ``(P,)``.
        rounding: ``(C,)``, how much larger ``mean`` is than the mean before it was rounded; None for 0.
        is_floor: ``(C,)``, where ``invstd`` is a constant because the variance is below its floor; None for
            nowhere.
    """

    mean: Tensor
    invstd: Tensor
    samples: int | Tensor
    rounding: Tensor | None = None
    is_floor: Tensor | None = None

    def spread(self, devices: Iterable[torch.device]) -> dict[torch.device, WholeBatch]:
        """Return, for every device, the part of this that the passes over a batch read."""
        found = {self.mean.device: self}
        away = [device for device in dict.fromkeys(devices) if device not in found]
        if away:
            both = torch.stack([self.mean, self.invstd])
            for device in away:
                samples = self.samples
                if isinstance(samples, Tensor):
                    samples = samples.to(device, non_blocking=True)
                mean, invstd = both.to(device, non_blocking=True).unbind()
                found[device] = WholeBatch(mean, invstd, samples)
        return found


class RunningStatistics(NamedTuple):
    """The running statistics of a layer, which are updated in place.

    Attributes:
        mean: ``(C,)``.
        var: ``(C,)``.
        num_batches_tracked: the counter; None for no counter.
        momentum: the weight of the new batch; None for the cumulative average.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are updated."""
        return [t for t in (self.mean, self.var, self.num_batches_tracked) if t is not None]


class Processes(Protocol):
    """The processes that a layer synchronizes over; see ``syncbn_core._processes.collectives``."""

    def merge(self, mean: Tensor, m2: Tensor, count: int) -> tuple[Tensor, Tensor, int | Tensor]:
        """Merge the statistics of all processes."""

    @property
    def are_many(self) -> bool:
        """Whether a sum of their statistics costs less than a gather of them."""

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of every process, ``(P, *)``, in rank order."""

    def add(self, values: Tensor) -> Tensor:
        """Return the sum of the statistics of all processes, in the forward."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the gradients of all processes, in the backward."""


class Reduction(NamedTuple):
    """How the statistics of all replicas become those of the whole batch.

    Attributes:
        dtype: of the arithmetic on the inputs.
        eps: added to the variance, or its floor.
        clamps: whether eps is a floor.
        finish: the layer's own last step.
        move: the part of it that updates the running statistics, given mean and unbiased variance.
        is_standard: whether ``finish`` does the same as torch's own layer, so that a kernel may replace it.
        running: the running statistics; None for none.
        processes: the processes to merge with; None for this one alone.
        chain: where there are several processes, the order of their collectives in the backward.
        is_running: tells whether replicas of this forward are still running.
        weight: ``(C,)`` or None, replica 0's.
        bias: ``(C,)`` or None, replica 0's.
        name: the layer's name, for error messages.
    """

    dtype: torch.dtype
    eps: float
    clamps: bool
    finish: Finish
    move: Callable[[Tensor, Tensor], None]
    is_standard: bool
    running: RunningStatistics | None
    processes: Processes | None
    chain: Any
    is_running: Callable[[], bool]
    weight: Tensor | None
    bias: Tensor | None
    name: str


class Kernels(Protocol):
    """The passes over the batch on one kind of device. None of them reads a device's memory on the host."""

    joins_small_batches: bool
    """Whether the master should normalize small batches of several replicas as one batch."""

    normalizes_in_replicas: bool
    """Whether each replica's own thread should write that replica's output."""

    def laid_out(self, x: Tensor) -> Tensor:
        """Return ``x``, or a differentiable copy of it if the kernels cannot read its layout."""

    def local_statistics(self, x: Tensor, eps: float) -> Statistics:
        """Return the statistics of one replica's batch, ``(N, C, *)``; N may be 0."""

    def merge(self, parts: Sequence[Statistics], counts: Sequence[int], how: Reduction) -> WholeBatch:
        """Merge the statistics of all replicas, which are on one device, and update the running statistics.

        Raises:
            ValueError: there is one sample per channel in all replicas and processes together.
            BrokenSyncError: another process failed or did not arrive.
        """

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return ``(x - mean) * invstd * weight + bias`` in the shape, dtype and layout of ``x``."""

    def gradient_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of ``dy`` and of ``dy * (x - mean)`` per channel, ``(C,)`` each."""

    def input_gradient(self, dy: Tensor | None, x: Tensor, given: InputGradient) -> Tensor:
        """Return ``dx`` in the shape, dtype and layout of ``x``; a ``dy`` of None is 0."""


class InputGradient(NamedTuple):
    """What ``input_gradient`` needs in addition to ``dy`` and ``x``, on their device.

    The gradient of each replica, with n as the total count, is ::

        dx = weight * invstd * (dy - sum_dy / n - (x - mean) * invstd**2 * sum_dy_xmu / n)

    Attributes:
        mean: ``(C,)``, of the whole batch.
        invstd: ``(C,)``, of the whole batch.
        weight: ``(C,)`` or None, the replica's own.
        sum_dy: ``(C,)``, over the whole batch.
        sum_dy_xmu: ``(C,)``, over the whole batch, of ``dy * (x - mean)``.
        samples: see `WholeBatch`.
    """

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    sum_dy: Tensor
    sum_dy_xmu: Tensor
    samples: int | Tensor
