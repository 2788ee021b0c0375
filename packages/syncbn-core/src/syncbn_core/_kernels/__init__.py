"""The arithmetic on batches: a specification by plain operations, and kernels for each kind of device."""

from __future__ import annotations

import torch

from syncbn_core._kernels.accelerator import AcceleratorKernels
from syncbn_core._kernels.cpu import CpuKernels
from syncbn_core._kernels.plain import PlainKernels
from syncbn_core._kernels.protocol import Kernels

_CPU: Kernels = CpuKernels()
_ACCELERATOR: Kernels = AcceleratorKernels()
PLAIN: Kernels = PlainKernels()

_WITH_BATCH_NORM_KERNELS = ("cuda", "xpu", "hpu")


def kernels_of(device: torch.device) -> Kernels:
    """Return the kernels for a device: those of ``nn.SyncBatchNorm`` on every kind that it accepts."""
    if device.type == "cpu":
        return _CPU
    if device.type in _WITH_BATCH_NORM_KERNELS or device.type == torch._C._get_privateuse1_backend_name():
        return _ACCELERATOR
    return PLAIN
