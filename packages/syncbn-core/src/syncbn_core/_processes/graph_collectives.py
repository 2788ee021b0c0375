"""Collectives that a compiler can put into a graph, and the layout of their messages.

The layout is that of the eager layer (`collectives`), so a process that compiles its model and one that does
not understand each other.

``torch.ops._c10d_functional`` is private by name and public in use: ``DTensor`` and fully sharded data
parallel are made of it, and the compilers know it. Its Python wrappers have changed their names (and warn of
the old ones), the operators themselves have not since torch 2.2. They are named here alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn_core._kernels.statistics import compute_dtype, merge_stacked
from syncbn_core._processes import collectives


class Group(NamedTuple):
    """Several processes that synchronize a layer, as a graph names them.

    Attributes:
        name: of the process group, known to torch.
        world_size: how many processes.
    """

    name: str
    world_size: int


def group_of(process_group: Any, where: str) -> Group | None:
    """Return the processes that a layer's ``process_group`` means now; None for this process alone.

    Args:
        process_group: None for the default group, where there is one; a group; or `THIS_PROCESS`.
        where: the layer's name, for error messages.

    Raises:
        ValueError: this process is not in the group.
    """
    if process_group is collectives.THIS_PROCESS or not dist.is_available() or not dist.is_initialized():
        return None
    if process_group is None:
        process_group = dist.group.WORLD
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"expected a process_group that this process is in at {where!r}, got one without process "
            f"{dist.get_rank()}: give every process its own sub-group, or THIS_PROCESS"
        )
    world_size = dist.get_world_size(process_group)
    return Group(process_group.group_name, world_size) if world_size > 1 else None


def all_gather(values: Tensor, group: Group) -> Tensor:
    """The ``values`` of every process, of any one shape, as ``(P, *shape)`` in rank order."""
    functional = torch.ops._c10d_functional
    everybody = functional.all_gather_into_tensor(values.unsqueeze(0), group.world_size, group.name)
    result: Tensor = functional.wait_tensor(everybody)
    return result


def all_reduce(values: Tensor, group: Group) -> Tensor:
    """Return the sum of the ``values`` of every process, of any one shape."""
    functional = torch.ops._c10d_functional
    total: Tensor = functional.wait_tensor(functional.all_reduce(values, "sum", group.name))
    return total


def expect(condition: Tensor, message: str) -> None:
    """Raise RuntimeError if a condition, ``(1,)``, is false; the host does not wait."""
    torch._assert_async(condition.squeeze(), message)


def merge(mean: Tensor, m2: Tensor, count: int, eps: float, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of all processes by one collective.

    Args:
        mean: ``(C,)``, in the dtype in which statistics are merged.
        m2: ``(C,)``, the same.
        count: the number of values per channel.
        eps: added to the variance.
        group: the processes.

    Returns:
        mean and m2, ``(C,)``, and count, ``(1,)``, of all processes.
    """
    many = group.world_size >= collectives.MANY
    own = torch.full((1,), count, dtype=mean.dtype, device=mean.device)
    # An accelerator's eager layer sends 1 / sqrt(var + eps) rather than m2, and sums with eps in them.
    in_eps = 0.0 if mean.is_cpu else eps
    if many:
        squares = torch.addcmul(m2 + in_eps * own, mean * own, mean)
        total = all_reduce(torch.cat([mean * own, squares, own, _tags(mean, 2)]), group)
        c = len(mean)
        n = total[2 * c : 2 * c + 1]
        mean, square = total[:c] / n.clamp(min=1), total[c : 2 * c] / n.clamp(min=1)
        return mean, (square - mean * mean - in_eps).clamp(min=0) * n, n
    if mean.is_cpu:
        rows = all_gather(torch.cat([mean, m2, own, _tags(mean, 1)]), group)
        c = len(mean)
        return merge_stacked(rows[:, :c], rows[:, c : 2 * c], rows[:, 2 * c : 2 * c + 1])
    invstd = (m2 / own.clamp(min=1) + eps).rsqrt()
    dtype = compute_dtype(torch.float32) if mean.dtype != torch.float64 else mean.dtype
    rows = all_gather(torch.cat([mean, invstd, own]).to(dtype), group).to(mean.dtype)
    c = len(mean)
    counts = rows[:, 2 * c :]
    return merge_stacked(rows[:, :c], (rows[:, c : 2 * c].pow(-2) - eps) * counts, counts)


def sum_gradients(sum_dy: Tensor, sum_dy_xmu: Tensor, group: Group) -> Tensor:
    """Return the sums of all processes, ``(2, C)``, by one collective."""
    sums = torch.cat([sum_dy, sum_dy_xmu])
    if not sums.is_cpu:
        return all_reduce(sums, group).view(2, -1)
    many = group.world_size >= collectives.MANY
    sums = torch.cat([sums, _tags(sums, 2 if many else 1)])
    total = all_reduce(sums, group) if many else all_gather(sums, group).sum(0)
    return total[: 2 * len(sum_dy)].view(2, -1)


def _tags(like: Tensor, number: int) -> Tensor:
    # A graph is the same for every call, so it cannot tell which call it is.
    return torch.full((number,), collectives.UNKNOWN, dtype=like.dtype, device=like.device)
