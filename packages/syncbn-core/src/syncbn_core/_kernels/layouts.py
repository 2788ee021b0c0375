"""The memory layouts that torch's batch-norm kernels are fast for."""

from __future__ import annotations

import torch
from torch import Tensor

DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` has one of the layouts that the kernels are fast for."""
    return any(x.is_contiguous(memory_format=layout) for layout in DENSE)


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """Return ``dy`` with the strides of ``x``: itself, or a copy.

    The kernels of accelerators read both tensors by one layout. On the CPU, those for halves are exact only
    then.
    """
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)
