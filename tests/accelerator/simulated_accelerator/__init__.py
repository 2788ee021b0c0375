"""An accelerator of four devices, ``sim:0`` to ``sim:3``, in host memory.

It takes torch's PrivateUse1 slot, as the accelerators of other makers do. Arithmetic runs on the CPU, so the
numbers are right. Simulated is what surrounds them: devices that do not mix, streams and events, a backward
thread for each device, the batch-norm kernels of GPUs with the dtypes and layouts that they insist on, a
process group, and a count of launches, copies and reads by the host.

Example::

    import simulated_accelerator as accelerator

    accelerator.load()  # builds the device the first time: needs a C++ compiler and ninja
    x = torch.randn(8, 3, 4, 4, device="sim:1")
    with accelerator.counted() as counts:
        torch.batch_norm_stats(x + 1, 1e-5)
    assert counts == {"add": 1, "batch_norm_stats": 1}

`torch.Tensor.is_cuda` is False on it. Ask for the device's type, as ``nn.SyncBatchNorm`` does.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["BACKEND", "DEVICES", "Counts", "counted", "load", "missing", "stream_checks"]

_HOMES = {
    "BACKEND": "process_group",
    "Counts": "counting",
    "DEVICES": "device",
    "counted": "counting",
    "load": "device",
    "missing": "build",
    "stream_checks": "streams",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: pytest imports the fixture where there is no torch, too."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
