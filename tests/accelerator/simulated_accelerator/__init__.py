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

from simulated_accelerator.build import missing
from simulated_accelerator.counting import Counts, counted
from simulated_accelerator.device import DEVICES, load
from simulated_accelerator.process_group import BACKEND
from simulated_accelerator.streams import stream_checks

__all__ = ["BACKEND", "DEVICES", "Counts", "counted", "load", "missing", "stream_checks"]
