"""The forward that ``torch.compile`` and ``torch.export`` trace as one graph, collectives included.

The eager layer calls kernels, weak references and other threads, none of which a graph can hold. Under a
compiler a layer takes this way instead: plain operations, which the compiler fuses with their neighbors, and
over processes one collective each way::

    x -> statistics -> all_gather -> merge -> y              forward
    dy -> sums -> all_gather or all_reduce -> dx             backward, written by hand

========================================  ==================================================
a layer                                   is traced as
========================================  ==================================================
in evaluation                             ``torch.nn.functional.batch_norm``
in training, alone                        the same
in training, alone, ``eps_mode="clamp"``  plain operations with their derived backward
in training, over processes               the operations above
with replicas, or with overridden hooks   nothing: the graph breaks, and the layer runs as without a compiler
========================================  ==================================================

No operation here makes the host wait for a device. The layout of what is sent is that of the eager layer, so
a process that compiles its model and one that does not understand each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_core._autograd.compiled_node import count_of, over_processes
from syncbn_core._kernels.plain import normalize
from syncbn_core._kernels.statistics import check_total, compute_dtype, local_statistics
from syncbn_core._options import clamps
from syncbn_core._processes.collectives import note_compiled, places_are_checked
from syncbn_core._processes.graph_collectives import group_of

if TYPE_CHECKING:
    from syncbn_core._base import _SynchronizedBatchNorm


def is_traceable(layer: _SynchronizedBatchNorm) -> bool:
    """Whether `forward` does what this layer has to do."""
    if not layer.training and layer.running_mean is not None:
        return True
    if layer._place is not None and (layer._place.nested or layer._place.group is not None):
        return False  # no graph holds what other threads do
    if not (layer._has_own("_data_parallel_master") and layer._has_own("_compute_mean_std")):
        return False
    return not places_are_checked()  # by collectives besides


# A compiler calls these once. torch.compiler.assume_constant_result sets the same, but loads the compiler.
for _function in (places_are_checked, note_compiled):
    vars(_function)["_dynamo_marked_constant"] = True


def forward(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """What the layer makes of ``x``, ``(N, C, *)``, by operations that a compiler can trace."""
    of_batch = layer.training or layer.running_mean is None
    group = group_of(layer.process_group, layer._where()) if layer.training else None
    if group is not None:
        return over_processes(layer, x, group)
    clamped = clamps(layer.eps_mode, synchronizes=False)
    if of_batch and clamped:
        return _alone(layer, x)
    if clamped:
        return layer._forward_running(x)
    if layer.training and layer.momentum is None and layer.track_running_stats:
        return _alone_cumulative(layer, x)
    return _BatchNorm.forward(layer, x)


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a break of the graph around it."""
    reason = (
        "a synchronized batch norm meets other replicas in other threads, or its hooks are overridden, which "
        "no graph can hold"
    )
    if "reason" in inspect.signature(torch.compiler.disable).parameters:
        return torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call,no-any-return]
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call,no-any-return]


def not_a_tensor(x: object, where: str) -> str:
    """What to say where a layer is called on something else than a tensor, as ``torch.fx`` does."""
    if isinstance(x, torch.fx.Proxy):
        return (
            f"expected a tensor at {where!r}, got a Proxy of torch.fx.symbolic_trace, which does not trace "
            "through synchronized layers: trace what syncbn_convert.revert_model(model) returns, or use a "
            "Tracer whose is_leaf_module() returns True for nn.modules.batchnorm._NormBase"
        )
    return f"expected a tensor at {where!r}, got {type(x).__name__}"


def _alone(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """By the statistics of this batch, where torch's own operation does something else."""
    count = count_of(x)
    check_total(count, layer._where())
    mean, m2 = local_statistics(x)
    if count == 0:  # nothing to learn from, nothing to normalize
        invstd = torch.ones_like(mean)
    else:
        mean, invstd = layer._compute_mean_std(mean, m2, count)
    return normalize(x, mean, invstd, layer.weight, layer.bias).to(x.dtype)


def _alone_cumulative(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """With ``momentum=None``: torch's own layer would read its counter on the host, which breaks a graph."""
    dtype = compute_dtype(x.dtype)
    mean, unbiased_var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    y = F.batch_norm(x, mean, unbiased_var, layer.weight, layer.bias, True, 1.0, layer.eps)
    layer._move_running_statistics(mean, unbiased_var)
    return y
