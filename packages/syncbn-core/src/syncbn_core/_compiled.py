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
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_core._compiled_node import count_of, over_processes
from syncbn_core._eps import resolve_eps_mode
from syncbn_core._graph_collectives import group_of
from syncbn_core._processes import CHECK_VARIABLE
from syncbn_core._statistics import check_total, compute_dtype, local_statistics, normalize

_SYNCHRONIZED = f"{__package__}._synchronized"  # which imports this module

if TYPE_CHECKING:
    from syncbn_core._synchronized import _SynchronizedBatchNorm


def is_traceable(layer: _SynchronizedBatchNorm) -> bool:
    """Whether `forward` does what this layer has to do."""
    if not layer.training and layer.running_mean is not None:
        return True
    if layer._replication is not None and (layer._replication.nested or layer._group() is not None):
        return False  # no graph holds what other threads do
    if any(hook in layer.__dict__ for hook in _HOOKS) or not _has_own_hooks(type(layer)):
        return False
    return not _places_are_checked()  # by collectives besides


_HOOKS = ("_data_parallel_master", "_compute_mean_std")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_own_hooks(kind: type) -> bool:
    """Whether a class of layers has inherited the hooks that `forward` does not call."""
    definers = {next(base for base in kind.__mro__ if hook in vars(base)) for hook in _HOOKS}
    return {definer.__module__ for definer in definers} == {_SYNCHRONIZED}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _places_are_checked() -> bool:
    return os.environ.get(CHECK_VARIABLE, "0") not in ("", "0")


def outside_of_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a compiler call a function instead of tracing it."""
    reason = {"reason": _REASON} if _HAS_REASON else {}
    outside: Callable[..., Tensor] = torch.compiler.disable(function, **reason)  # type: ignore[no-untyped-call]
    return outside


_REASON = (
    "a synchronized batch norm meets other replicas in other threads, or its hooks are overridden, which no "
    "graph can hold"
)
_HAS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.7 on


def forward(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """What the layer makes of ``x``, ``(N, C, *)``, by operations that a compiler can trace."""
    of_batch = layer.training or layer.running_mean is None
    clamps = resolve_eps_mode(layer.eps_mode) == "clamp"
    group = group_of(layer.process_group, layer._where()) if layer.training else None
    if group is not None:
        return over_processes(layer, x, group, clamps)
    if of_batch and (clamps or x.numel() == 0):
        return _alone(layer, x)
    if clamps:
        return layer._forward_running(x)
    if layer.training and layer.momentum is None and layer.track_running_stats:
        return _alone_cumulative(layer, x)
    return _BatchNorm.forward(layer, x)


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
    mean, m2 = local_statistics(x).unbind()
    if count == 0:  # nothing to learn from, nothing to normalize
        return normalize(x, mean, torch.ones_like(mean), layer.weight, layer.bias)
    return normalize(x, *layer._compute_mean_std(mean, m2, count), layer.weight, layer.bias)


def _alone_cumulative(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """With ``momentum=None``: torch's own layer would read its counter on the host, which breaks a graph."""
    dtype = compute_dtype(x.dtype)
    mean, unbiased_var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    y = F.batch_norm(x, mean, unbiased_var, layer.weight, layer.bias, True, 1.0, layer.eps)
    layer._move_running_statistics(mean, unbiased_var)
    return y
