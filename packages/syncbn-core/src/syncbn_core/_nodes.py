"""The three autograd nodes of the fused path: one graph for all replicas.

They do in every case. In those that are common on a CPU, `_together` and `_apart` do it with a single node.

::

    x_i --> Gather_i --(statistics)--> Merge --(mean, invstd...)--> Apply_i --> y_i
               |                                                   ^
               +------------------ x_i, the same storage ----------+

A backward that waited for the other replicas would dead-lock, since autograd runs all CPU nodes on one
thread. Here nobody waits: Merge is one node for all replicas, so autograd itself calls it when the sums of
every replica are there. What travels backward between the nodes is not a derivative; their composition is:

- Apply_i hands ``dy`` on to Gather_i untouched, and the two sums over ``dy`` to Merge;
- Merge adds the sums of all replicas and returns to each Gather_i the vectors that make ``dx`` of it;
- Gather_i forms ``dx``.

Kept for backward are x by reference and vectors of length C.

Gather and Apply keep their tensors by ``save_for_backward``, which a gradient checkpoint around a part of a
replica intercepts. Merge does not: it runs in replica 0's thread on behalf of all, and no recomputation
of one replica runs it again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _kernels
from ._order import Chain
from ._processes import Processes
from ._statistics import merge_statistics

Finish = Callable[[Tensor, Tensor, int | Tensor], tuple[Tensor, Tensor]]
"""(mean, m2, count) of the whole batch -> (mean, invstd) to normalise with; moves the running statistics."""

Move = Callable[[Tensor, Tensor], None]
"""(mean, unbiased variance) of the whole batch -> None; moves the running statistics."""


def gather(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Where data enters: ``x`` -> ``x`` itself, and the statistics of it.

    Args:
        x: ``(N, C, *)``.
        name: the layer's, for error messages.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, _kernels.local_statistics(x)
    results: tuple[Tensor, Tensor] = _Gather.apply(x, name)  # type: ignore[no-untyped-call]
    return results


class Reduction(NamedTuple):
    """What the reduction needs to know beside the statistics.

    Attributes:
        counts: of samples, by replica.
        dtype: of the arithmetic on x.
        finish: turns what was merged into what to normalise with.
        weight: ``(C,)`` or None, replica 0's.
        bias: ``(C,)`` or None, replica 0's.
        min_var: the floor of the variance; 0 for none.
        name: the layer's, for error messages.
        processes: those to merge with; None for this one alone.
        chain: where there are several, the order of their backward collectives.
    """

    counts: Sequence[int]
    dtype: torch.dtype
    finish: Finish
    weight: Tensor | None
    bias: Tensor | None
    min_var: float
    name: str
    processes: Processes | None
    chain: Chain | None


def merge(parts: Sequence[Tensor], how: Reduction) -> tuple[Tensor, ...]:
    """Where data is reduced: the statistics of all replicas -> what was agreed on, for each of them.

    Args:
        parts: the statistics of each replica, in rank order, on its own device.
        how: see there.

    Returns:
        The `_kernels.forward_vectors` for each replica, on its own device.
    """
    previous = how.chain.take() if how.chain is not None else None
    results: tuple[Tensor, ...] = _Merge.apply(how, previous, *parts)  # type: ignore[no-untyped-call]
    if how.chain is not None:
        how.chain.give(results[0])
    return results


def apply(x: Tensor, agreed: Tensor, weight: Tensor | None, bias: Tensor | None, name: str) -> Tensor:
    """Where data leaves: ``x``, and what was agreed on -> y, as ``x`` in shape, dtype and layout."""
    y: Tensor = _Apply.apply(x, agreed, weight, bias, name)  # type: ignore[no-untyped-call]
    return y


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        ctx.where = name
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.detach(), _kernels.local_statistics(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, vectors: Tensor | None) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if vectors is None:  # no replica's output was used, so neither was this one's
            return None, None
        with torch.no_grad():
            dx = _kernels.input_gradient(dy, x, vectors)
        return refuse_second_derivative(ctx.where, [dx], [dy, x, vectors])[0], None


class _Merge(Function):
    @staticmethod
    def forward(ctx: Any, how: Reduction, previous: Tensor | None, *parts: Tensor) -> tuple[Tensor, ...]:
        device = parts[0].device
        mean, m2 = merge_statistics([part.to(device, non_blocking=True) for part in parts], how.counts)
        own_count = sum(how.counts)
        count: int | Tensor = own_count
        if how.processes is not None:
            mean, m2, count = how.processes.merge(mean, m2, own_count)
        mean, invstd = how.finish(mean, m2, count)
        # Not `how` itself: a graph that held the layer could hold itself.
        ctx.where, ctx.dtype, ctx.processes, ctx.chain = how.name, how.dtype, how.processes, how.chain
        ctx.devices = [part.device for part in parts]
        ctx.mean, ctx.invstd, ctx.count = mean, invstd, count
        ctx.scale = invstd if how.weight is None else invstd * how.weight
        # Where the variance was raised to min_var, invstd does not depend on it.
        ctx.constant_invstd = (m2 < how.min_var * count) if how.min_var > 0 else None
        ctx.set_materialize_grads(False)
        agreed = _kernels.forward_vectors(mean, invstd, ctx.scale, how.bias, how.dtype)
        # An output each, be it of the same storage, so that each replica's sums come back on their own.
        return tuple(agreed.detach().to(device, non_blocking=True) for device in ctx.devices)

    @staticmethod
    def backward(ctx: Any, *sums: Tensor | None) -> tuple[Tensor | None, ...]:
        # In rank order, whatever the order in which autograd came by.
        used = [part.to(ctx.devices[0], non_blocking=True) for part in sums if part is not None]
        if ctx.chain is not None:
            ctx.chain.over = True
        if not used and ctx.processes is None:
            return (None,) * (2 + len(sums))
        mean, invstd, count = ctx.mean, ctx.invstd, ctx.count
        with torch.no_grad():
            # Reached by the chain alone, it has nothing to add, but other processes may.
            if len(used) > 1:
                total = torch.stack(used)[:, :2].sum(0, dtype=mean.dtype)
            else:
                total = used[0][:2].to(mean.dtype) if used else mean.new_zeros(2, len(mean))
            sum_dy, sum_dy_xmu = total.unbind()
            sum_dy_normalized = sum_dy_xmu * invstd  # with x normalised
            if ctx.processes is not None:
                own = torch.stack([sum_dy, sum_dy_normalized])
                sum_dy, sum_dy_normalized = ctx.processes.sum(own).unbind()
            slope = sum_dy_normalized * invstd / count
            if ctx.constant_invstd is not None:
                slope = slope.masked_fill(ctx.constant_invstd, 0.0)
            kind = ctx.devices[0]
            vectors = _kernels.backward_vectors(mean, ctx.scale, sum_dy / count, slope, kind, ctx.dtype)
            wanted = [
                vectors.to(device, non_blocking=True) if needed else None
                for device, needed in zip(ctx.devices, ctx.needs_input_grad[2:])
            ]
        return None, None, *refuse_second_derivative(ctx.where, wanted, sums)


class _Apply(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, agreed: Tensor, weight: Tensor | None, bias: Tensor | None, name: str
    ) -> Tensor:
        ctx.where = name
        ctx.affine_dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        ctx.save_for_backward(x, agreed, weight)
        # Kept besides, because a checkpoint drops what is saved: the next Merge is chained to this one, and a
        # recomputation returns to it.
        ctx.agreed = agreed
        ctx.set_materialize_grads(False)
        return _kernels.normalize(x, agreed, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, agreed, weight = ctx.saved_tensors
        if dy is None:
            return None, None, None, None, None
        _, _, need_weight, need_bias, _ = ctx.needs_input_grad
        with torch.no_grad():
            sums = _kernels.gradient_sums(dy, x, agreed)
            weight_dtype, bias_dtype = ctx.affine_dtypes
            sum_dy, sum_dy_xmu, *_ = sums.unbind()
            dweight = (sum_dy_xmu * agreed[2]).to(weight_dtype) if need_weight else None
            dbias = sum_dy.to(bias_dtype) if need_bias else None
        computed = refuse_second_derivative(ctx.where, [sums, dweight, dbias], [dy, x, weight])
        return dy, *computed, None


def refuse_second_derivative(
    name: str, results: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Under ``create_graph=True``, tie the results of a backward to its inputs by a node that raises."""
    if not torch.is_grad_enabled():
        return results
    tensors = [r for r in results if r is not None]
    refused = iter(_SecondDerivative.apply(name, len(tensors), *tensors, *inputs))  # type: ignore[no-untyped-call]
    return [None if r is None else next(refused) for r in results]


class _SecondDerivative(Function):
    @staticmethod
    def forward(ctx: Any, name: str, n_results: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.where = name
        return tuple(t.view_as(t) for t in tensors[:n_results] if t is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"expected only first derivatives through {ctx.where}, got a request for a second one: the fused "
            "path has none. Build the layer with fused=False, or convert_model(model, fused=False), for "
            "derivatives of any order (gradient penalties, Hessian-vector products)"
        )
