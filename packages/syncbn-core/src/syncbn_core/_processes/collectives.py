"""The processes that a layer synchronizes over, where ``torch.distributed`` is initialized.

A layer issues one collective in the forward and one in the backward.

===========  ===============================  =======================================
phase        up to 8 processes                more processes
===========  ===============================  =======================================
forward      gather of count, mean and m2     sum of count, sum and sum of squares
             (accelerators: invstd)           (float64)
backward     sum of sum_dy, sum_dy_xmu; on the CPU, up to 8 processes, as a gather
===========  ===============================  =======================================

A gather loses no digits, but every process receives the numbers of all. On the CPU with gloo it is faster
than a reduction as long as the processes are few.

On the CPU, two numbers are sent with the data: one stands for the layer, the other for the call of it. So
processes that are at different layers get an error rather than each other's statistics.
"""

from __future__ import annotations

import enum
import os
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn_comm import BrokenSyncError
from syncbn_core._kernels.layouts import is_batched
from syncbn_core._kernels.statistics import merge_dtype, merge_stacked, merge_statistics

CHECK_VARIABLE = "SYNCBN_CHECK"

# With this many processes or more, sums are sent in the forward too.
MANY = 9

# Private to torch, which has no public way to ask.
_transforms_active = torch._C._are_functorch_transforms_active

# Up to here merging one by one takes fewer operations than merging all at once.
_FEW = 3

# The number of a call in a process that does not count its calls, because some of them are compiled.
UNKNOWN = 0.0

# The gather into one tensor is called all_gather_into_tensor, and all_gather_single from torch 2.13 on.
_gather_into = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

_REMEDY = (
    f"set {CHECK_VARIABLE}=1 to see where each process is. If the model is in DistributedDataParallel with "
    "find_unused_parameters=True and the processes use different parameters, give the layers a group of "
    "their own: convert_model(model, process_group=torch.distributed.new_group())"
)


class Scope(enum.Enum):
    """Values that can take the place of a process group."""

    THIS_PROCESS = "the replicas of this process"

    def __repr__(self) -> str:
        return self.name


THIS_PROCESS = Scope.THIS_PROCESS
"""As a layer's ``process_group``: synchronize over the replicas of this process alone."""


# The names of layers that have run in a compiled graph, where nobody counts their calls.
_compiled: set[str] = set()


def note_compiled(name: str) -> None:
    """Note that a layer is in a compiled graph, so that its eager calls do not send their number."""
    _compiled.add(name)


def tag_of_layer(phase: str, name: str) -> float:
    """Return a number for a layer and a phase, of which a float64 can hold a sum.

    Args:
        phase: "forward" or "backward".
        name: the layer's name, the same in all processes. ``torch.compile`` may be a part of it in some.
    """
    return _checksum(f"{phase} {name.replace('_orig_mod.', '')}")


def _checksum(text: str) -> float:
    return float(zlib.crc32(text.encode()))


class Calls:
    """How often a layer has synchronized over processes. Its replicas share one object."""

    def __init__(self) -> None:
        self.number = 0


class Processes:
    """Several processes that synchronize one call of one layer, seen from one of them.

    Args:
        group: their process group; None for the default one.
        name: the layer's name, the same in all processes, for error messages.
        calls: the layer's counter of calls, which counts this call.
    """

    def __init__(self, group: Any, name: str, calls: Calls) -> None:
        self._group = group
        self._name = name
        calls.number += 1
        self._is_counted = name not in _compiled
        self._call = f"call {calls.number}"
        self._place = f"{name!r} ({self._call})"
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    @property
    def are_many(self) -> bool:
        """Whether a sum of their statistics costs less than a gather of them."""
        return self.world_size >= MANY

    def merge(self, mean: Tensor, m2: Tensor, count: int) -> tuple[Tensor, Tensor, int | Tensor]:
        """Merge the statistics of all processes, ``(C,)`` each.

        Waits for all of them. The count comes back as a number where the host has it.
        """
        if self.are_many:
            mean = mean.to(merge_dtype(mean.device))
            squares = torch.addcmul(m2, mean, mean, value=count)
            sums = self.add(torch.cat([mean * count, squares, mean.new_full((1,), count)]))
            total = sums[-1:]
            mean, square = (sums[:-1] / total.clamp(min=1)).view(2, -1).unbind()
            m2 = (square - mean * mean).clamp(min=0) * total
            return mean, m2, int(total) if total.is_cpu else total
        everybody = self.gather(_packed(mean, m2, count))
        if not everybody.is_cpu:
            return merge_stacked(*_unpacked(everybody))
        if self.world_size > _FEW:
            mean, m2, total = merge_stacked(*_unpacked(everybody))
            return mean, m2, int(total)
        counts = [int(each) for each in everybody[:, -1].tolist()]
        n = len(mean)
        parts = [(row[:n], row[n:-1]) for row in everybody]
        return *merge_statistics(parts, counts), sum(counts)

    def merge_with_gradient(self, mean: Tensor, m2: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same with derivatives of any order, by a gather for any number of processes."""
        anchor = torch.empty(0, requires_grad=True)
        packed = _packed(mean, m2, count)
        everybody: Tensor = _Gather.apply(packed, self, anchor)  # type: ignore[no-untyped-call]
        return merge_stacked(*_unpacked(everybody))

    def gather(self, values: Tensor) -> Tensor:
        """Return the ``values`` of every process, of any one shape, as ``(P, *shape)`` in rank order."""
        return self._gather(values, "forward")

    def add(self, values: Tensor) -> Tensor:
        """Return the sum of the ``values`` of every process, in the forward."""
        return self._sum(values, "forward")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the ``values`` of every process, in the backward.

        It may be written to ``values``, so these cannot be used any more.

        Raises:
            RuntimeError: ``values`` are many gradients at once.
        """
        if is_batched([values]):
            raise RuntimeError(
                f"expected one gradient at a time in the backward of {self._place} over processes, got many "
                "at once (is_grads_batched=True, jacobian(vectorize=True), torch.func.vmap): call "
                "autograd.grad once for each"
            )
        if values.is_cpu and not self.are_many:
            return self._gather(values, "backward").sum(0).to(values.dtype)
        return self._sum(values, "backward")

    def _gather(self, values: Tensor, phase: str) -> Tensor:
        if not values.is_cpu:
            values = values.contiguous()
            everybody = values.new_empty(self.world_size, *values.shape)
            if _gather_into is not None and dist.get_backend(self._group) != "gloo":
                collective = _gather_into
                self._collect(
                    phase, values, lambda: collective(everybody.flatten(0, 1), values, group=self._group)
                )
            else:
                rows = list(everybody.unbind())
                self._collect(phase, values, lambda: dist.all_gather(rows, values, group=self._group))
            return everybody
        layer, call = self._tags(phase)
        # In float64, which holds the numbers that are the tags.
        tagged = torch.cat([values.reshape(-1), torch.tensor([layer, call], dtype=torch.float64)])
        everybody = tagged.new_empty(self.world_size, len(tagged))
        rows = list(everybody.unbind())
        self._collect(phase, values, lambda: dist.all_gather(rows, tagged, group=self._group))
        layers, calls = zip(*everybody[:, -2:].tolist())
        if len({*layers}) > 1 or len({*calls} - {UNKNOWN}) > 1:
            others = [rank for rank in range(self.world_size) if (layers[rank], calls[rank]) != (layer, call)]
            raise self._strayed(phase, f"process {', '.join(map(str, others))}")
        return everybody[:, :-2].reshape(self.world_size, *values.shape)

    def _sum(self, values: Tensor, phase: str) -> Tensor:
        if not values.is_cpu:
            self._collect(phase, values, lambda: dist.all_reduce(values, group=self._group))
            return values
        layer, call = self._tags(phase)
        tags = torch.tensor([layer, call, float(call != UNKNOWN)], dtype=torch.float64)
        total = torch.cat([values.reshape(-1), tags])
        self._collect(phase, values, lambda: dist.all_reduce(total, group=self._group))
        layers, calls, known = total[-3:].tolist()
        if layers != layer * self.world_size or (call != UNKNOWN and calls != call * known):
            raise self._strayed(phase, "another process")
        return total[:-3].view(values.shape).to(values.dtype)

    def _tags(self, phase: str) -> tuple[float, float]:
        """Return a number for the layer and one for the call, of which a float64 can hold sums."""
        return tag_of_layer(phase, self._name), _checksum(self._call) if self._is_counted else UNKNOWN

    def _strayed(self, phase: str, who: str) -> BrokenSyncError:
        return BrokenSyncError(
            f"expected all processes in the {phase} of {self._place}, got {who} at another layer or another "
            f"call of it. All processes have to run the same layers in the same order; {_REMEDY}"
        )

    def _collect(self, phase: str, values: Tensor, collective: Callable[[], Any]) -> None:
        try:
            if places_are_checked():
                self._check_place(phase, values)
            collective()
        except BrokenSyncError:
            raise
        except RuntimeError as error:
            raise BrokenSyncError(
                f"process {self.rank} (of 0 to {self.world_size - 1}) could not synchronize with the others "
                f"in the {phase} of {self._place}: {error}\nTo find the cause, {_REMEDY}"
            ) from error

    def _check_place(self, phase: str, values: Tensor) -> None:
        """Compare with the other processes which layer this is, which call of it, and how much it sends."""
        place = f"the {phase} of {self._place}, sending {values.numel()} numbers of {values.dtype}"
        places: list[Any] = [None] * self.world_size
        dist.all_gather_object(places, place, group=self._group)
        if len(set(places)) > 1:
            who = "; ".join(f"process {rank} in {other}" for rank, other in enumerate(places))
            raise BrokenSyncError(f"expected all processes at one place, got {who}")


def places_are_checked() -> bool:
    """Whether the environment asks to compare where the processes are, before each collective."""
    return os.environ.get(CHECK_VARIABLE, "0") not in ("", "0")


def are_several(process_group: Any, name: str) -> bool:
    """Whether a layer's ``process_group`` means several processes at this moment.

    Args:
        process_group: None for the default group, where there is one; a group; or `THIS_PROCESS`.
        name: the layer's name, for error messages.

    Raises:
        ValueError: this process is not in the group.
        RuntimeError: it does, and a function transform (``torch.func``) is active in this thread.
    """
    if process_group is THIS_PROCESS or not dist.is_available() or not dist.is_initialized():
        return False
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"expected a process_group that this process is in at {name!r}, got one without process "
            f"{dist.get_rank()}: give every process its own sub-group, or THIS_PROCESS"
        )
    several = dist.get_world_size(process_group) > 1
    if several and not torch.compiler.is_compiling() and _transforms_active():
        raise RuntimeError(
            f"expected the forward of {name!r} over several processes outside of function transforms, got "
            "one inside (torch.func.grad, vjp, jvp, jacrev, jacfwd, hessian or vmap), which does not reach "
            "the other processes. Use torch.autograd.grad, with fused=False for second derivatives, or "
            "process_group=THIS_PROCESS to normalize by the batch of this process alone"
        )
    return several


def _packed(mean: Tensor, m2: Tensor, count: int) -> Tensor:
    """Return ``(2C + 1,)``: the count is that of every channel."""
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
        return processes.sum(rows.clone())[processes.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        anchor = torch.empty(0, requires_grad=True)
        return _Gather.apply(grad, ctx.processes, anchor), None, None  # type: ignore[no-untyped-call]
