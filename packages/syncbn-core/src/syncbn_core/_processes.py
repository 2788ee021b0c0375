"""The processes that a layer synchronizes over, where ``torch.distributed`` is initialised.

One collective per layer in forward, one in backward. Both are gathers of a few numbers per channel that every
process adds up by itself, in rank order: on gloo that is faster than a reduction as long as the processes are
few, and every process has bitwise the same result. With many of them the backward reduces.
"""

import enum
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn_comm import BrokenSyncError

from ._statistics import merge_dtype, merge_stacked, merge_statistics

CHECK_VARIABLE = "SYNCBN_CHECK"

# Up to here a gather and a local sum cost less than a reduction (measured on gloo).
_GATHER_UP_TO = 8

# Up to here merging one by one takes fewer operations than merging all at once.
_FEW = 3


class Scope(enum.Enum):
    """What can stand for a process group."""

    THIS_PROCESS = "the replicas of this process"

    def __repr__(self) -> str:
        return self.name


THIS_PROCESS = Scope.THIS_PROCESS
"""As a layer's ``process_group``: synchronize over the replicas of this process alone."""


class Processes:
    """Several processes that synchronize one layer, seen from one of them.

    Args:
        group: theirs; None for the default one.
        name: the layer's, for error messages.
    """

    def __init__(self, group: Any, name: str) -> None:
        self._group = group
        self._name = name
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def merge(self, mean: Tensor, m2: Tensor, count: int) -> tuple[Tensor, Tensor, int | Tensor]:
        """Merge the statistics of all processes, ``(C,)`` each.

        Waits for all of them, as `gather` does. The count comes back as a number where the host has it.
        """
        everybody = self.gather(_packed(mean, m2, count))
        if not everybody.is_cpu:
            return merge_stacked(*_unpacked(everybody))
        if self.world_size > _FEW:
            mean, m2, total = merge_stacked(*_unpacked(everybody))
            return mean, m2, int(total)
        counts = [int(each) for each in everybody[:, -1].tolist()]
        parts = everybody[:, :-1].view(len(counts), 2, -1).unbind()
        return *merge_statistics(parts, counts), sum(counts)

    def merge_with_gradient(self, mean: Tensor, m2: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same with derivatives of any order."""
        anchor = torch.empty(0, requires_grad=True)
        packed = _packed(mean, m2, count)
        everybody: Tensor = _Gather.apply(packed, self, anchor)  # type: ignore[no-untyped-call]
        return merge_stacked(*_unpacked(everybody))

    def gather(self, values: Tensor) -> Tensor:
        """The ``values`` of every process, of any one shape, as ``(P, *shape)`` in rank order."""
        return self._gather(values, "forward")

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the ``values`` of every process, of any one shape."""
        if self.world_size <= _GATHER_UP_TO:
            return self._gather(values, "backward").sum(0)
        total = values.clone()
        self._collect("backward", lambda: dist.all_reduce(total, group=self._group))
        return total

    def _gather(self, values: Tensor, phase: str) -> Tensor:
        values = values.contiguous()
        everybody = values.new_empty(self.world_size, *values.shape)
        rows = list(everybody.unbind())
        self._collect(phase, lambda: dist.all_gather(rows, values, group=self._group))
        return everybody

    def _collect(self, phase: str, collective: Callable[[], Any]) -> None:
        try:
            if os.environ.get(CHECK_VARIABLE, "0") not in ("", "0"):
                self._check_place(phase)
            collective()
        except BrokenSyncError:
            raise
        except RuntimeError as error:
            raise BrokenSyncError(
                f"process {self.rank} of {self.world_size} could not synchronize with the others "
                f"in the {phase} of {self._name!r}: {error}"
            ) from error

    def _check_place(self, phase: str) -> None:
        """Compare with the other processes which layer this is, and which call of it."""
        _calls[id(self._group), self._name, phase] += 1
        place = f"the {phase} of {self._name!r} (call {_calls[id(self._group), self._name, phase]})"
        places: list[Any] = [None] * self.world_size
        dist.all_gather_object(places, place, group=self._group)
        if len(set(places)) > 1:
            who = ", ".join(f"process {rank} at {other}" for rank, other in enumerate(places))
            raise BrokenSyncError(f"expected all processes at one place, got {who}")


_calls: Counter[tuple[int, str, str]] = Counter()  # kept only where places are checked


def processes_of(process_group: Any, name: str) -> Processes | None:
    """The processes that a layer's ``process_group`` means at this moment; None for this one alone.

    Args:
        process_group: None for the default group, where there is one; a group; or `THIS_PROCESS`.
        name: the layer's, for error messages.

    Raises:
        ValueError: this process is not in the group.
    """
    if process_group is THIS_PROCESS or not dist.is_available() or not dist.is_initialized():
        return None
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"expected a process_group that this process is in at {name!r}, got one without process "
            f"{dist.get_rank()}: give every process its own sub-group, or THIS_PROCESS"
        )
    processes = Processes(process_group, name)
    return processes if processes.world_size > 1 else None


def _packed(mean: Tensor, m2: Tensor, count: int) -> Tensor:
    """``(2C + 1,)``: the count is that of every channel."""
    return torch.cat([mean, m2, mean.new_full((1,), count, dtype=merge_dtype(mean.device))])


def _unpacked(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(P, 2C + 1)`` -> the means and m2s of every process, ``(P, C)``, and its count, ``(P, 1)``."""
    n = rows.shape[1] // 2
    return rows[:, :n], rows[:, n:-1], rows[:, -1:]


class _Gather(torch.autograd.Function):
    """`Processes.gather` as a node; the anchor makes every process take part in the backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes, anchor: Tensor) -> Tensor:
        ctx.processes = processes
        return processes.gather(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        anchor = torch.empty(0, requires_grad=True)
        return _SumOfOwn.apply(grad, ctx.processes, anchor), None, None  # type: ignore[no-untyped-call]


class _SumOfOwn(torch.autograd.Function):
    """The adjoint of a gather: ``(P, n)`` -> ``(n,)``, the sum over all processes of this one's row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, processes: Processes, anchor: Tensor) -> Tensor:
        ctx.processes = processes
        return processes.sum(rows)[processes.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        anchor = torch.empty(0, requires_grad=True)
        return _Gather.apply(grad, ctx.processes, anchor), None, None  # type: ignore[no-untyped-call]
