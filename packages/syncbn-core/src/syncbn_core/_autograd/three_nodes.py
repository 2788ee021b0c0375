"""Three autograd nodes per layer, in one graph for all replicas.

::

    x_i ──► Gather_i ──(statistics)──► Merge ──(mean, invstd)──► Apply_i ──► y_i
               │                                                    ▲
               └──────────────── x_i, the same storage ─────────────┘

A backward that waits for the other replicas would deadlock, since autograd runs all CPU nodes on one thread.
Here no thread waits. Merge is one node for all replicas, so autograd calls it when it has the sums of every
replica. The tensors that the nodes send back are not derivatives by themselves; the composition is exact:

- Apply_i passes ``dy`` unchanged to Gather_i, and the two sums over ``dy`` to Merge.
- Merge adds the sums of all replicas, makes the gradients of weight and bias, and returns to each Gather_i
  the vectors that it needs.
- Gather_i forms ``dx``.

Gather and Apply keep their tensors by ``save_for_backward``, which a gradient checkpoint around a part of a
replica intercepts. Merge does not: it runs in replica 0's thread for all replicas, and a recomputation of one
replica does not run it again.

If nothing intercepts the saved tensors, `one_node` does the same with a single node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn_core._autograd.gradients import (
    backward_kernels_of,
    reduce_gradients,
    refuse_inside_forward,
    refuse_second_derivative,
)
from syncbn_core._kernels import kernels_of
from syncbn_core._kernels.layouts import is_batched
from syncbn_core._kernels.protocol import InputGradient, Reduction
from syncbn_core._kernels.statistics import merge_dtype
from syncbn_core._kernels.streams import across

# Autograd requires a gradient to have the shape of its tensor. Gather passes two vectors to Merge and gets
# five back: mean, invstd, weight, and the means of dy and of dy * (x - mean).
_ROWS = 5


def gather(x: Tensor, eps: float, name: str) -> tuple[Tensor, Tensor]:
    """Return ``x`` itself and its statistics: where data enters.

    Args:
        x: ``(N, C, *)``.
        eps: added to the variance.
        name: the layer's name, for error messages.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, _statistics(x, eps)
    results: tuple[Tensor, Tensor] = _Gather.apply(x, eps, name)  # type: ignore[no-untyped-call]
    return results


def merge(parts: Sequence[Tensor], counts: Sequence[int], how: Reduction) -> tuple[Tensor, ...]:
    """Return the statistics to normalize with, for each replica: where data is reduced.

    Args:
        parts: the statistics of each replica, in rank order, on its own device.
        counts: the number of samples of each replica.
        how: the layer's options for the reduction.

    Returns:
        mean and invstd of the whole batch, ``(2, C)``, for each replica on its own device.
    """
    previous = how.chain.take() if how.chain is not None else None
    results: tuple[Tensor, ...] = _Merge.apply(  # type: ignore[no-untyped-call]
        how, counts, how.weight, how.bias, previous, *parts
    )
    if how.chain is not None:
        how.chain.give(results[0])
    return results


def apply(x: Tensor, agreed: Tensor, weight: Tensor | None, bias: Tensor | None, name: str) -> Tensor:
    """Return y, in the shape, dtype and layout of ``x``: where data leaves.

    Args:
        x: ``(N, C, *)``.
        agreed: what `merge` returns for this replica.
        weight: ``(C,)`` or None; its gradient comes from Merge.
        bias: ``(C,)`` or None; its gradient comes from Merge.
        name: the layer's name, for error messages.
    """
    weight = None if weight is None else weight.detach()
    bias = None if bias is None else bias.detach()
    y: Tensor = _Apply.apply(x, agreed, weight, bias, name)  # type: ignore[no-untyped-call]
    return y


def _statistics(x: Tensor, eps: float) -> Tensor:
    first, second = kernels_of(x.device).local_statistics(x, eps)
    statistics = torch.stack([first, *[second] * (_ROWS - 1)])
    # On accelerators they have the dtype that the merge kernel needs.
    return statistics.to(merge_dtype(x.device)) if x.device.type in ("cpu", "mps") else statistics


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, name: str) -> tuple[Tensor, Tensor]:
        ctx.where = name
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.detach(), _statistics(x, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, vectors: Tensor | None) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        if vectors is None:  # no replica's output was used, so neither was this one's
            return None, None, None
        kernels = backward_kernels_of(x.device, is_batched([dy, vectors]))
        with torch.no_grad():
            mean, invstd, weight, mean_dy, mean_dy_xmu = vectors.unbind()
            dx = kernels.input_gradient(dy, x, InputGradient(mean, invstd, weight, mean_dy, mean_dy_xmu, 1))
        return refuse_second_derivative(ctx.where, [dx], [dy, x, vectors])[0], None, None


class _Merge(Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: Reduction,
        counts: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        previous: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        home = parts[0].device
        moved = [_pair(part, home) for part in parts]
        whole = kernels_of(home).merge(moved, counts, how)
        # Not `how` itself: it holds the layer, and so a reference cycle through the graph would be possible.
        ctx.where, ctx.processes, ctx.chain = how.name, how.processes, how.chain
        ctx.is_running = how.is_running
        ctx.whole, ctx.devices = whole, [part.device for part in parts]
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        # A copy, because the weight may be changed in place before the backward, and nothing reports that.
        ctx.weight = None if weight is None else weight.detach().clone()
        ctx.set_materialize_grads(False)
        agreed = torch.stack([whole.mean, whole.invstd])
        # One output for each replica, even with the same storage, so that the sums come back separately.
        return tuple(agreed.detach().to(device, non_blocking=True) for device in ctx.devices)

    @staticmethod
    def backward(ctx: Any, *sums: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_inside_forward(ctx.is_running, ctx.where)
        if ctx.chain is not None:
            ctx.chain.over = True
        whole = ctx.whole
        home = whole.mean.device
        _, _, need_weight, need_bias, _, *need_parts = ctx.needs_input_grad
        dweight = dbias = None
        wanted: list[Tensor | None] = [None] * len(sums)
        with torch.no_grad(), across(home, ctx.devices):
            # In rank order, whatever the order in which autograd ran the nodes.
            parts = [_pair(part, home) for part in sums if part is not None]
            reduced = reduce_gradients(parts, whole, ctx.processes)
            if reduced is not None:
                weight_dtype, bias_dtype = ctx.dtypes
                if need_weight and reduced.dweight is not None:
                    dweight = reduced.dweight.to(weight_dtype)
                if need_bias and reduced.dbias is not None:
                    dbias = reduced.dbias.to(bias_dtype)
                vectors = _vectors(whole.mean, whole.invstd, ctx.weight, reduced.sums, whole.samples)
                wanted = [
                    vectors.to(device, non_blocking=True) if needed else None
                    for device, needed in zip(ctx.devices, need_parts)
                ]
        needing = torch.empty(0, requires_grad=need_weight)  # for a second derivative by the weight
        dweight, dbias, *wanted = refuse_second_derivative(
            ctx.where, [dweight, dbias, *wanted], [*sums, needing]
        )
        return None, None, dweight, dbias, None, *wanted


def _pair(rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = rows[:2].to(device, non_blocking=True).unbind()
    return first, second


def _vectors(
    mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, samples: int | Tensor
) -> Tensor:
    """Return the ``(_ROWS, C)`` that Gather needs."""
    n = samples.sum() if isinstance(samples, Tensor) else max(samples, 1)
    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    return torch.stack([mean, invstd, weight, *(sums / n).unbind()])


class _Apply(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, agreed: Tensor, weight: Tensor | None, bias: Tensor | None, name: str
    ) -> Tensor:
        ctx.where = name
        ctx.save_for_backward(x, agreed)
        # Also kept here, because a checkpoint drops saved tensors: the next Merge is chained to this one, and
        # a recomputation uses it again.
        ctx.agreed = agreed
        ctx.set_materialize_grads(False)
        mean, invstd = agreed.unbind()
        return kernels_of(x.device).normalize(x, mean, invstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, agreed = ctx.saved_tensors
        if dy is None:
            return None, None, None, None, None
        mean, invstd = agreed.unbind()
        with torch.no_grad():
            kernels = backward_kernels_of(x.device, is_batched([dy]))
            sums = torch.stack(kernels.gradient_sums(dy, x, mean, invstd))
        return dy, *refuse_second_derivative(ctx.where, [sums], [dy, x, agreed]), None, None, None
