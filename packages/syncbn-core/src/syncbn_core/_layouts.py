"""The layouts of memory that torch's batch-norm kernels are fast for."""

import torch
from torch import Tensor

DENSE = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` has one of the layouts that the kernels are fast for."""
    return any(x.is_contiguous(memory_format=layout) for layout in DENSE)


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    """``dy`` with the strides of ``x``, or a copy with them.

    The kernels for CUDA read both by one of the two layouts, and those for halves on the CPU are exact then.
    """
    return dy if dy.stride() == x.stride() else torch.empty_like(x, dtype=dy.dtype).copy_(dy)
