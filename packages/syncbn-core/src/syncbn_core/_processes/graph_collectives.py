"""Collectives that a compiler can put into a graph, and the layout of their messages.

The layout is that of the eager layer (`collectives`), so a process that compiles its model and one that does
not understand each other. On the CPU it includes a number that stands for the layer. Processes that are at
different layers, as after an exception in one of them, get an error.

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


Place = tuple[str, str]
"""The phase, "forward" or "backward", and the layer's name: where a process is."""


def group_of(process_group: Any, where: str) -> Group | None:
    """Return the processes that a layer's ``process_group`` means now; None for this process alone.

    Args:
        process_group: None for the default group, where there is one; a group; or `THIS_PROCESS`.
        where: the layer's name, for error messages.

    Raises:
        ValueError: this process is not in the group.
    """
    if not collectives.are_several(process_group, where):
        return None
    process_group = dist.group.WORLD if process_group is None else process_group
    return Group(process_group.group_name, dist.get_world_size(process_group))


def all_gather(values: Tensor, group: Group, place: Place) -> Tensor:
    """The ``values`` of every process, ``(n,)`` each, as ``(P, n)`` in rank order."""
    functional = torch.ops._c10d_functional
    n, tag = len(values), collectives.tag_of_layer(*place)
    if values.is_cpu:
        values = torch.cat([values, _numbers(values, tag, collectives.UNKNOWN)])
    everybody = functional.all_gather_into_tensor(values.unsqueeze(0), group.world_size, group.name)
    result: Tensor = functional.wait_tensor(everybody)
    if values.is_cpu:
        _expect_one_place((result[:, n] == tag).all(), place)
    return result[:, :n]


def all_reduce(values: Tensor, group: Group, place: Place) -> tuple[Tensor, Tensor]:
    """Return the sum of the ``values`` of every process, ``(n,)`` each, and the own ``values``.

    A caller that needs its own values after the sum has to take those that this function returns. Inductor
    lets a sum overwrite its input if nothing reads the input later. It does not see a read of a tensor that
    was concatenated into the input, although the two share memory (torch 2.11 to 2.13).
    """
    functional = torch.ops._c10d_functional
    n, tag = len(values), collectives.tag_of_layer(*place)
    if values.is_cpu:
        values = torch.cat([values, _numbers(values, tag, collectives.UNKNOWN, 0.0)])
    total: Tensor = functional.wait_tensor(functional.all_reduce(values, "sum", group.name))
    if values.is_cpu:
        _expect_one_place(total[n] == tag * group.world_size, place)
    return total[:n], values[:n]


def _numbers(like: Tensor, *numbers: float) -> Tensor:
    return torch.cat([like.new_full((1,), number) for number in numbers])


def expect(condition: Tensor, message: str) -> None:
    """Raise RuntimeError if a condition, ``(1,)``, is false; the host does not wait."""
    torch._assert_async(condition.squeeze(), message)


def merge(
    mean: Tensor, m2: Tensor, count: int, eps: float, group: Group, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of all processes by one collective.

    Args:
        mean: ``(C,)``, in the dtype in which statistics are merged.
        m2: ``(C,)``, the same.
        count: the number of values per channel.
        eps: added to the variance.
        group: the processes.
        name: the layer's name in all processes.

    Returns:
        mean and m2, ``(C,)``, and count, ``(1,)``, of all processes.
    """
    many = group.world_size >= collectives.MANY
    own = torch.full((1,), count, dtype=mean.dtype, device=mean.device)
    # An accelerator's eager layer sends 1 / sqrt(var + eps) rather than m2, and sums with eps in them.
    in_eps = 0.0 if mean.is_cpu else eps
    if many:
        squares = torch.addcmul(m2 + in_eps * own, mean * own, mean)
        total, _ = all_reduce(torch.cat([mean * own, squares, own]), group, ("forward", name))
        c = len(mean)
        n = total[2 * c : 2 * c + 1]
        mean, square = total[:c] / n.clamp(min=1), total[c : 2 * c] / n.clamp(min=1)
        return mean, (square - mean * mean - in_eps).clamp(min=0) * n, n
    if mean.is_cpu:
        rows = all_gather(torch.cat([mean, m2, own]), group, ("forward", name))
        c = len(mean)
        return merge_stacked(rows[:, :c], rows[:, c : 2 * c], rows[:, 2 * c :])
    invstd = (m2 / own.clamp(min=1) + eps).rsqrt()
    dtype = compute_dtype(torch.float32) if mean.dtype != torch.float64 else mean.dtype
    rows = all_gather(torch.cat([mean, invstd, own]).to(dtype), group, ("forward", name)).to(mean.dtype)
    c = len(mean)
    counts = rows[:, 2 * c :]
    return merge_stacked(rows[:, :c], (rows[:, c : 2 * c].pow(-2) - eps) * counts, counts)


def sum_gradients(sum_dy: Tensor, sum_dy_xmu: Tensor, group: Group, name: str) -> tuple[Tensor, Tensor]:
    """Return the sums of all processes, by one collective, and those of this process; ``(2, C)`` each."""
    own, place = torch.cat([sum_dy, sum_dy_xmu]), ("backward", name)
    if own.is_cpu and group.world_size < collectives.MANY:
        total = all_gather(own, group, place).sum(0)
    else:
        total, own = all_reduce(own, group, place)
    return total.view(2, -1), own.view(2, -1)


def _expect_one_place(condition: Tensor, place: Place) -> None:
    phase, name = place
    expect(
        condition,
        f"expected all processes in the {phase} of {name!r}, got another process at another layer. All "
        "processes have to run the same layers in the same order",
    )
