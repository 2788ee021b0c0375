"""The forward that ``torch.compile`` and ``torch.export`` trace as one graph, collectives included.

The eager layer calls kernels, weak references and other threads, none of which a graph can hold. A
compiler gets this forward instead: plain operations, which the compiler fuses with their neighbors, and
over processes one collective each way::

    x -> statistics -> all_gather -> merge -> y              forward
    dy -> sums -> all_gather or all_reduce -> dx             backward, written by hand

========================================  ==================================================
a layer                                   is traced as
========================================  ==================================================
in evaluation                             ``torch.nn.functional.batch_norm``
in training, alone                        the same
in training, alone, ``eps_mode="clamp"``  plain operations with their derived backward
in training, over processes               the operations above; ``torch.export`` gets an error
with replicas, or with overridden hooks   nothing: the graph breaks, and the layer runs as without a compiler
========================================  ==================================================

No operation here makes the host wait for a device. The messages have the same layout as those of the eager
layer, so a process that compiles its model can train together with one that does not.
"""

from __future__ import annotations

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
from syncbn_core._processes.collectives import (
    are_several,
    note_compiled,
    places_are_checked,
    tag_of_layer,
)
from syncbn_core._processes.graph_collectives import group_of

if TYPE_CHECKING:
    from syncbn_core._base import _SynchronizedBatchNorm


# Older versions have not been tested. There the graph breaks: a compiler that makes wrong gradients, as that
# of torch 2.11 did at first, does so in silence.
_TRACES_COLLECTIVES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def _is_exporting() -> bool:
    """Whether this is ``torch.export``, which traces the forward of a node and derives a backward of its own.

    Before torch 2.13, ``torch.compiler.is_exporting`` is True in ``torch.compile`` as well. The flag behind
    it is private, and exists from torch 2.7 on.
    """
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return not torch.compiler.is_dynamo_compiling() if flag is None else flag


def is_traceable(layer: _SynchronizedBatchNorm) -> bool:
    """Whether `forward` does what this layer has to do."""
    if not layer.training and layer.running_mean is not None:
        return True
    if layer._place is not None and (layer._place.nested or layer._place.group is not None):
        return False  # no graph holds what other threads do
    if not (layer._has_own("_data_parallel_master") and layer._has_own("_compute_mean_std")):
        return False
    if not (_TRACES_COLLECTIVES or _is_exporting()) and are_several(layer.process_group, layer._where()):
        return False
    return not places_are_checked()  # by collectives besides


# A compiler calls these once. torch.compiler.assume_constant_result sets the same, but loads the compiler.
for _function in (places_are_checked, note_compiled, tag_of_layer):
    vars(_function)["_dynamo_marked_constant"] = True


def forward(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """Return the layer's output for ``x``, ``(N, C, *)``, by operations that a compiler can trace."""
    of_batch = layer.training or layer.running_mean is None
    group = group_of(layer.process_group, layer._where()) if layer.training else None
    if group is not None:
        if _is_exporting():
            raise RuntimeError(
                f"expected torch.export of {layer._where()!r} in training mode without other processes, got "
                f"{group.world_size} processes: an exported program has no backward of their collectives. "
                "Export model.eval(), or set process_group=THIS_PROCESS in its layers"
            )
        return over_processes(layer, x, group)
    clamped = clamps(layer.eps_mode, synchronizes=False)
    if of_batch and clamped:
        return _alone(layer, x)
    if clamped:
        return layer._forward_running(x)
    if layer.training and layer.momentum is None and layer.track_running_stats:
        return _alone_cumulative(layer, x)
    return _BatchNorm.forward(layer, x)


REASON = (
    "a synchronized batch norm meets other replicas in other threads, or its hooks are overridden, or "
    "SYNCBN_CHECK is set, and no graph can hold any of that"
)
"""Why a graph breaks at a layer."""


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a break of the graph around it, which gives `REASON`.

    ``torch.compiler.disable`` does that where a compiler does not trace it. Here it is called outside of the
    graph, so that no compiler is loaded where nothing is compiled.
    """

    def outside(*arguments: Any) -> Any:
        return torch.compiler.disable(function)(*arguments)  # type: ignore[no-untyped-call]

    # The private marks that torch.compiler.disable leaves: do not trace a call of it, for this reason.
    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return outside


def not_a_tensor(x: object, where: str) -> str:
    """Return the message for a call on something that is not a tensor, as by ``torch.fx``."""
    if isinstance(x, torch.fx.Proxy):
        return (
            f"expected a tensor at {where!r}, got a Proxy of torch.fx.symbolic_trace, which does not trace "
            "through synchronized layers: trace what syncbn_convert.revert_model(model) returns, or use a "
            "Tracer whose is_leaf_module() returns True for nn.modules.batchnorm._NormBase"
        )
    return f"expected a tensor at {where!r}, got {type(x).__name__}"


def _alone(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """Normalize by the statistics of this batch, where torch's own operation does something else."""
    count = count_of(x)
    check_total(count, layer._where())
    mean, m2 = local_statistics(x)
    if count == 0:  # nothing to learn from, nothing to normalize
        invstd = torch.ones_like(mean)
    else:
        mean, invstd = layer._compute_mean_std(mean, m2, count)
    return normalize(x, mean, invstd, layer.weight, layer.bias).to(x.dtype)


def _alone_cumulative(layer: _SynchronizedBatchNorm, x: Tensor) -> Tensor:
    """Do so with ``momentum=None``, where torch's own layer reads its counter and so breaks the graph."""
    dtype = compute_dtype(x.dtype)
    mean, unbiased_var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    y = F.batch_norm(x, mean, unbiased_var, layer.weight, layer.bias, True, 1.0, layer.eps)
    layer._move_running_statistics(mean, unbiased_var)
    return y
