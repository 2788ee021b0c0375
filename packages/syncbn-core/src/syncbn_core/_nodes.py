"""The three autograd nodes of the fused path: one graph for all replicas.

::

    x_i --> Gather_i --(statistics)--> Merge --(mean, invstd)--> Apply_i --> y_i
               |                                                   ^
               +------------------ x_i, the same storage ----------+

A backward that waited for the other replicas would dead-lock, since autograd runs all CPU nodes on one
thread. Here nobody waits: Merge is one node for all replicas, so autograd itself calls it when the sums of
every replica are there. What travels backward between the nodes is not a derivative; their composition is:

- Apply_i hands ``dy`` on to Gather_i untouched, and the two sums over ``dy`` to Merge;
- Merge adds the sums of all replicas and returns to each Gather_i the coefficients of its ``dx``;
- Gather_i forms ``dx``.

Kept for backward are x by reference and vectors of length C.

Gather and Apply keep their tensors by ``save_for_backward``, which a gradient checkpoint around a part of a
replica intercepts. Merge does not: it runs in replica 0's thread on behalf of all, and no recomputation
of one replica runs it again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _kernels
from ._order import Chain
from ._processes import Processes
from ._statistics import merge_statistics

Finish = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(mean, m2, count) of the whole batch -> (mean, invstd) to normalise with; moves the running statistics."""


def gather(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Where data enters: ``x`` -> ``x`` itself, and the ``(3, C)`` statistics of it.

    Args:
        x: ``(N, C, *)``.
        name: the layer's, for error messages.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, _kernels.local_statistics(x)
    results: tuple[Tensor, Tensor] = _Gather.apply(x, name)  # type: ignore[no-untyped-call]
    return results


def merge(
    parts: Sequence[Tensor],
    finish: Finish,
    weight: Tensor | None,
    min_var: float,
    name: str,
    processes: Processes | None,
    chain: Chain | None,
) -> tuple[Tensor, ...]:
    """Where data is reduced: the statistics of all replicas -> ``(2, C)`` mean and invstd for each of them.

    Args:
        parts: ``(3, C)`` from each replica, in rank order, on its own device.
        finish: turns the merged statistics into mean and invstd.
        weight: ``(C,)`` or None, replica 0's.
        min_var: the floor of the variance; 0 for none.
        name: the layer's, for error messages.
        processes: those to merge with; None for this one alone.
        chain: where there are several, the order of their backward collectives.
    """
    previous = chain.take() if chain is not None else None
    results: tuple[Tensor, ...] = _Merge.apply(  # type: ignore[no-untyped-call]
        finish, weight, min_var, name, processes, chain, previous, *parts
    )
    if chain is not None:
        chain.give(results[0])
    return results


def apply(x: Tensor, mean_invstd: Tensor, weight: Tensor | None, bias: Tensor | None, name: str) -> Tensor:
    """Where data leaves: ``x``, and ``(2, C)`` mean and invstd -> y, as ``x`` in shape, dtype and layout."""
    y: Tensor = _Apply.apply(x, mean_invstd, weight, bias, name)  # type: ignore[no-untyped-call]
    return y


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        statistics = _kernels.local_statistics(x)
        ctx.where = name
        ctx.mean = statistics.detach()[0]
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x.detach(), statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, coefficients: Tensor | None) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if coefficients is None:  # no replica's output was used, so neither was this one's
            return None, None
        with torch.no_grad():
            dx = _kernels.input_gradient(dy, x, ctx.mean, coefficients)
        return _refuse_second_derivative(ctx.where, [dx], [dy, x, coefficients])[0], None


class _Merge(Function):
    @staticmethod
    def forward(
        ctx: Any,
        finish: Finish,
        weight: Tensor | None,
        min_var: float,
        name: str,
        processes: Processes | None,
        chain: Chain | None,
        previous: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        device = parts[0].device
        here = [part.to(device, non_blocking=True) for part in parts]
        mean, m2, count = merge_statistics(here)
        if processes is not None:
            mean, m2, count = processes.merge(mean, m2, count)
        mean_invstd = torch.stack(finish(mean, m2, count))
        ctx.where, ctx.processes, ctx.chain = name, processes, chain
        ctx.devices = [part.device for part in parts]
        ctx.local_means = torch.stack([part[0] for part in here])  # (R, C)
        ctx.mean, ctx.invstd, ctx.count = mean, mean_invstd[1], count
        ctx.weight = weight
        # Where the variance was raised to min_var, invstd does not depend on it.
        ctx.constant_invstd = (m2 < min_var * count) if min_var > 0 else None
        ctx.set_materialize_grads(False)
        # An output each, be it of the same storage, so that each replica's sums come back on their own.
        return tuple(mean_invstd.detach().to(device, non_blocking=True) for device in ctx.devices)

    @staticmethod
    def backward(ctx: Any, *sums: Tensor | None) -> tuple[Tensor | None, ...]:
        # In rank order, whatever the order in which autograd came by.
        used = [part.to(ctx.devices[0], non_blocking=True) for part in sums if part is not None]
        if ctx.chain is not None:
            ctx.chain.over = True
        if not used and ctx.processes is None:
            return (None,) * (7 + len(sums))
        with torch.no_grad():
            # Reached by the chain alone, it has nothing to add, but other processes may.
            total = torch.stack(used).sum(0) if used else ctx.mean.new_zeros(2, len(ctx.mean))  # (2, C)
            if ctx.processes is not None:
                total = ctx.processes.sum(total)
            sum_dy, sum_dy_xmu = total.unbind()
            shift = sum_dy / ctx.count
            slope = sum_dy_xmu * ctx.invstd**2 / ctx.count
            if ctx.constant_invstd is not None:
                slope = slope.masked_fill(ctx.constant_invstd, 0.0)
            a = ctx.invstd if ctx.weight is None else ctx.invstd * ctx.weight
            # Seen from each replica's own mean, (R, C).
            shifts = torch.addcmul(shift, slope, ctx.local_means - ctx.mean)
            coefficients = torch.stack([a.expand_as(shifts), shifts, slope.expand_as(shifts)], 1)  # (R, 3, C)
            wanted = [
                part.to(device, non_blocking=True) if needed else None
                for part, device, needed in zip(coefficients.unbind(), ctx.devices, ctx.needs_input_grad[7:])
            ]
        return *(None,) * 7, *_refuse_second_derivative(ctx.where, wanted, sums)


class _Apply(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean_invstd: Tensor, weight: Tensor | None, bias: Tensor | None, name: str
    ) -> Tensor:
        mean, invstd = mean_invstd.unbind()
        ctx.where = name
        ctx.affine_dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        ctx.save_for_backward(x, mean_invstd, weight)
        # Kept besides, because a checkpoint drops what is saved: the next Merge is chained to this one, and a
        # recomputation returns to it.
        ctx.mean_invstd = mean_invstd
        ctx.set_materialize_grads(False)
        return _kernels.normalize(x, mean, invstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mean_invstd, weight = ctx.saved_tensors
        if dy is None:
            return None, None, None, None, None
        _, _, need_weight, need_bias, _ = ctx.needs_input_grad
        with torch.no_grad():
            mean, invstd = mean_invstd.unbind()
            sums = _kernels.gradient_sums(dy, x, mean, invstd)
            weight_dtype, bias_dtype = ctx.affine_dtypes
            dweight = (sums[1] * invstd).to(weight_dtype) if need_weight else None
            dbias = sums[0].to(bias_dtype) if need_bias else None
        computed = _refuse_second_derivative(ctx.where, [sums, dweight, dbias], [dy, x, weight])
        return dy, *computed, None


def _refuse_second_derivative(
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
