"""One autograd node for all replicas of a process.

::

    x_0 ──► local_statistics ──┐                          ┌──► normalize ──► y_0
    x_1 ──► local_statistics ──┼──► merge ──► (mean, ──────┼──► normalize ──► y_1
    ...                        │    (replica 0's thread)  │
                               └──────────────────────────┘    invstd)

`enter` and `leave` run in each replica's thread, `reduce` in the thread of replica 0. The node needs the
outputs of all replicas before the replicas can write them: on the CPU, `reduce` allocates the outputs and
`leave` writes them. On other devices, where writing is only a launch, `reduce` writes them as well.

Small batches on the CPU use `joined_node`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn_core._autograd import joined_node
from syncbn_core._autograd.gradients import (
    backward_kernels_of,
    reduce_gradients,
    refuse_inside_forward,
    refuse_second_derivative,
)
from syncbn_core._kernels import kernels_of
from syncbn_core._kernels.layouts import is_batched
from syncbn_core._kernels.protocol import InputGradient, Reduction, Statistics, WholeBatch
from syncbn_core._kernels.statistics import samples_per_channel
from syncbn_core._kernels.streams import across, current_stream, wait_for


class Share(NamedTuple):
    """What a replica contributes.

    Attributes:
        x: its input, ``(N, C, *)``; N may be 0.
        statistics: of its input; None if the master should compute them.
        samples: the number of samples per channel.
        weight: ``(C,)`` or None, on the device of ``x``.
        bias: ``(C,)`` or None, on the device of ``x``.
        stream: the stream of its kernels, if its device has streams.
    """

    x: Tensor
    statistics: Statistics | None
    samples: int
    weight: Tensor | None
    bias: Tensor | None
    stream: Any

    @property
    def tensor(self) -> Tensor:
        """The tensor that the master reads."""
        return self.x


class Output(NamedTuple):
    """What a replica receives.

    Attributes:
        y: its output.
        unwritten: the statistics to write it with; None if it is written already.
    """

    y: Tensor
    unwritten: WholeBatch | None


def enter(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, several: bool) -> Share:
    """Compute the statistics of a replica's input: where data enters."""
    kernels = kernels_of(x.device)
    joins = several and kernels.joins_small_batches and x.numel() <= joined_node.JOINED_UP_TO
    statistics = None
    if not joins:
        with torch.no_grad():
            statistics = kernels.local_statistics(x, eps)
    return Share(x, statistics, samples_per_channel(x), weight, bias, current_stream(x.device))


def reduce(shares: Sequence[Share], how: Reduction) -> list[Output]:
    """Merge the shares of all replicas and make the node: where data is reduced.

    Raises:
        ValueError: there is one sample per channel in all replicas and processes together.
        BrokenSyncError: another process failed or did not arrive.
    """
    inputs = [share.x for share in shares]
    if len(shares) > 1 and all(share.statistics is None for share in shares):
        joined = joined_node.reduce(inputs, how)
        if joined is not None:
            return [Output(y, None) for y in joined]
    previous = how.chain.take() if how.chain is not None else None
    plan = _plan(shares, how)
    *ys, _ = _BatchNorm.apply(plan, how.weight, how.bias, previous, *inputs)  # type: ignore[no-untyped-call]
    if how.chain is not None and ys[0].grad_fn is not None:
        how.chain.give_node(ys[0].grad_fn)
    return [Output(y, whole if plan.leaves_outputs else None) for y, whole in zip(ys, plan.wholes)]


def leave(output: Output, share: Share) -> Tensor:
    """Write a replica's output, if it is not written yet, and return it: where data leaves."""
    if output.unwritten is not None:
        mean, invstd, *_ = output.unwritten
        with torch.no_grad():
            y = output.y.detach()
            kernels_of(y.device).normalize(share.x, mean, invstd, share.weight, share.bias, out=y)
    return output.y


class _Plan(NamedTuple):
    """The parts of the node.

    Attributes:
        shares: of all replicas.
        wholes: the statistics of the whole batch, on the device of each replica.
        leaves_outputs: whether the replicas write their outputs.
        how: the layer's options for the reduction.
    """

    shares: Sequence[Share]
    wholes: Sequence[WholeBatch]
    leaves_outputs: bool
    how: Reduction


@torch.no_grad()
def _plan(shares: Sequence[Share], how: Reduction) -> _Plan:
    home = shares[0].x.device
    kernels = kernels_of(home)
    found = [share.statistics or kernels.local_statistics(share.x, how.eps) for share in shares]
    parts, counts = [_moved(part, home) for part in found], [share.samples for share in shares]
    spread = kernels.merge(parts, counts, how).spread(share.x.device for share in shares)
    leaves_outputs = kernels.normalizes_in_replicas and len(shares) > 1
    return _Plan(shares, [spread[share.x.device] for share in shares], leaves_outputs, how)


def _moved(pair: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = pair
    return first.to(device, non_blocking=True), second.to(device, non_blocking=True)


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        weight: Tensor | None,
        bias: Tensor | None,
        previous: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        # Not `how` itself: it holds the layer, and so a reference cycle through the graph would be possible.
        how = plan.how
        ctx.where, ctx.processes, ctx.chain = how.name, how.processes, how.chain
        ctx.is_running = how.is_running
        ctx.wholes = plan.wholes
        ctx.streams = [share.stream for share in plan.shares]
        ctx.dtypes = [None if p is None else p.dtype for p in (weight, bias)]
        ctx.set_materialize_grads(False)
        link = torch.empty(0)  # the next node of the chain depends on it; the last tensor that is saved
        others = [None if s.weight is None else s.weight.detach() for s in plan.shares[1:]]
        ctx.save_for_backward(*inputs, weight, *others, link)
        if plan.leaves_outputs:
            return *map(torch.empty_like, inputs), link
        ys = [
            kernels_of(x.device).normalize(x, whole.mean, whole.invstd, share.weight, share.bias)
            for x, whole, share in zip(inputs, plan.wholes, plan.shares)
        ]
        return *ys, link

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_inside_forward(ctx.is_running, ctx.where)
        *kept, _ = ctx.saved_tensors
        batches, weights = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        *dys, _ = grads
        _, need_weight, need_bias, _, *need_inputs = ctx.needs_input_grad
        if ctx.chain is not None:
            ctx.chain.over = True
        many = is_batched(dys)
        devices = [x.device for x in batches]
        with torch.no_grad(), across(devices[0], devices):
            for dy, stream in zip(dys, ctx.streams):
                if dy is None:  # no gradient has ordered this thread's streams after those of the forward
                    wait_for(stream)
            dweight, dbias, dxs = _gradients(
                dys, batches, weights, need_inputs, ctx.wholes, ctx.processes, many
            )
            weight_dtype, bias_dtype = ctx.dtypes
            dweight = dweight.to(weight_dtype) if need_weight and dweight is not None else None
            dbias = dbias.to(bias_dtype) if need_bias and dbias is not None else None
        dweight, dbias, *dxs = refuse_second_derivative(
            ctx.where, [dweight, dbias, *dxs], [*dys, weights[0], *batches]
        )
        return None, dweight, dbias, None, *dxs


def _gradients(
    dys: Sequence[Tensor | None],
    batches: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    wanted: Sequence[bool],
    wholes: Sequence[WholeBatch],
    processes: Any,
    many: bool,
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """Return dweight and dbias of all batches together, and the dx of each batch that needs one."""
    home = wholes[0].mean.device
    parts = []
    for dy, x, whole in zip(dys, batches, wholes):
        if dy is not None:
            kernels = backward_kernels_of(x.device, many)
            parts.append(_moved(kernels.gradient_sums(dy, x, whole.mean, whole.invstd), home))
    reduced = reduce_gradients(parts, wholes[0], processes)
    dxs: list[Tensor | None] = [None] * len(batches)
    if reduced is None:
        return None, None, dxs
    sums = {home: reduced.sums}
    # The last one first: the caches still hold it.
    for i in reversed(range(len(batches))):
        x, whole = batches[i], wholes[i]
        if not wanted[i]:
            continue
        if x.device not in sums:
            sums[x.device] = reduced.sums.to(x.device, non_blocking=True)
        sum_dy, sum_dy_xmu = sums[x.device].unbind()
        one = InputGradient(whole.mean, whole.invstd, weights[i], sum_dy, sum_dy_xmu, whole.samples)
        dxs[i] = backward_kernels_of(x.device, many).input_gradient(dys[i], x, one)
    return reduced.dweight, reduced.dbias, dxs
