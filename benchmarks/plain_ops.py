"""Synchronized batch norm as implementations in pure Python do it, for the benchmarks to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Sums = tuple[Tensor, Tensor, int]  # of x and of its squares over a replica's batch, and their number


class PlainOpsBatchNorm2d(nn.BatchNorm2d):
    """Plain differentiable operations on sums and sums of squares, under ``DataParallelWithCallback``.

    The variance is the mean of squares minus the squared mean, which is fast to write and loses all digits
    where the mean is large. It is here for its time alone.
    """

    def __data_parallel_replicate__(self, ctx: Any, copy_id: int) -> None:
        """Learn where the other replicas are."""
        self._replica, self._place = ctx.group.member(copy_id), ctx.name

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)`` by the statistics of all replicas."""
        x = input.reshape(input.shape[0], input.shape[1], -1)
        sums = x.sum((0, 2)), (x**2).sum((0, 2)), x.shape[0] * x.shape[2]
        mean, invstd = self._replica.exchange(sums, self._reduce, where=self._place)
        scale = (invstd * self.weight)[None, :, None]
        y = (x - mean[None, :, None]) * scale + self.bias[None, :, None]
        return y.to(input.dtype).reshape(input.shape)

    def _reduce(self, messages: Sequence[tuple[int, Sums]]) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        sums, squares, counts = zip(*(message for _, message in messages))
        here = self.weight.device
        count = sum(counts)
        mean = sum(each.to(here) for each in sums) / count
        var = sum(each.to(here) for each in squares) / count - mean**2
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_(var.float() * (count / (count - 1)), self.momentum)
        invstd = (var + self.eps).rsqrt()
        return [(rank, (mean.to(sums[rank].device), invstd.to(sums[rank].device))) for rank, _ in messages]
