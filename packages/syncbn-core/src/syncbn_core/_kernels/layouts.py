"""The memory layouts that torch's batch-norm kernels are fast for, and tensors that they cannot read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` has one of the layouts that the kernels are fast for."""
    return any(x.is_contiguous(memory_format=layout) for layout in DENSE)


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """Return ``dy`` with the strides of ``x``: itself, or a copy.

    The kernels of accelerators read both tensors by one layout. On the CPU, the kernels for half inputs are
    exact only if the layouts are equal.
    """
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def is_batched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are many gradients at once (``is_grads_batched=True``, ``jacobian(vectorize=True)``)."""
    # Private to torch, which has no public function for this. Autograd still makes the tensors of its first
    # vmap.
    functorch = torch._C._functorch
    kinds = (functorch.is_legacy_batchedtensor, functorch.is_batchedtensor)
    return any(t is not None and any(is_kind(t) for is_kind in kinds) for t in tensors)
