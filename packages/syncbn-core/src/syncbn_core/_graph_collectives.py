"""Collectives that a compiler can take into a graph, and the layout of what they send.

``torch.ops._c10d_functional`` is private by name and public in use: ``DTensor`` and fully sharded data
parallel are made of it, and the compilers know it. Its Python wrappers have changed their names (and warn of
the old ones), the operators themselves have not since torch 2.2. They are named here alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn_core._processes import THIS_PROCESS
from syncbn_core._statistics import merge_dtype

# Up to here a gather and a local sum cost less than a reduction. The eager layer has the same limit.
_GATHER_UP_TO = 8


class Group(NamedTuple):
    """Several processes that synchronize a layer, as a graph names them.

    Attributes:
        name: of the process group, known to torch.
        world_size: how many processes.
    """

    name: str
    world_size: int


def group_of(process_group: Any, where: str) -> Group | None:
    """The processes that a layer's ``process_group`` means at this moment; None for this one alone.

    Args:
        process_group: None for the default group, where there is one; a group; or `THIS_PROCESS`.
        where: the layer's name, for error messages.

    Raises:
        ValueError: this process is not in the group.
    """
    if process_group is THIS_PROCESS or not dist.is_available() or not dist.is_initialized():
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
    """The sum of the ``values`` of every process, of any one shape."""
    if group.world_size <= _GATHER_UP_TO:
        return all_gather(values, group).sum(0)
    functional = torch.ops._c10d_functional
    total: Tensor = functional.wait_tensor(functional.all_reduce(values, "sum", group.name))
    return total


def expect(condition: Tensor, message: str) -> None:
    """Raise RuntimeError where a condition, ``(1,)``, does not hold; the host does not wait for it.

    ``torch._assert_async`` is private by name. Torch has no public assertion that a graph can hold.
    """
    torch._assert_async(condition.squeeze(), message)


def pack_statistics(mean: Tensor, m2: Tensor, count: int) -> Tensor:
    """What a process sends in forward, ``(2C + 1,)``: mean and m2 of every channel, and the count of all."""
    dtype = merge_dtype(mean.device)
    return torch.cat([mean.to(dtype), m2.to(dtype), torch.full((1,), count, dtype=dtype, device=mean.device)])


def unpack_statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(P, 2C + 1)`` -> means and m2s of every process, ``(P, C)`` each, and counts, ``(P, 1)``."""
    channels = rows.shape[1] // 2
    return rows[:, :channels], rows[:, channels : 2 * channels], rows[:, 2 * channels : 2 * channels + 1]


def pack_gradient_sums(sum_dy: Tensor, sum_dy_normalized: Tensor) -> Tensor:
    """What a process sends in backward, ``(2, C)``."""
    return torch.stack([sum_dy, sum_dy_normalized]).to(merge_dtype(sum_dy.device))
