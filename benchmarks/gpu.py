"""What ``layer.py --device cuda`` has beyond the CPU: more layers to compare with, bandwidth and launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from report import Target, microseconds, table
from side_by_side import timed
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

SHAPES = [(64, 256, 56, 56)]
_STEPS = 20
_PASSES = 8  # a step reads twice and writes once forward, reads four times and writes once backward


class NativeBatchNorm2d(nn.BatchNorm2d):
    """Torch's own kernels, where ``nn.BatchNorm2d`` takes those of cuDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``."""
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(input)


class SyncBatchNormAlone(nn.BatchNorm2d):
    """What ``nn.SyncBatchNorm`` does, in a process that is the only one; the class itself would not do it."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``."""
        running = self.running_mean, self.running_var
        affine = self.weight, self.bias
        return SyncBatchNorm.apply(input, *affine, *running, self.eps, self.momentum, dist.group.WORLD, 1)


def places() -> list[list[str]]:
    """Two replicas on the first GPU, and one on each of all."""
    count = torch.cuda.device_count()
    return [["cuda:0"] * 2, *([[f"cuda:{i}" for i in range(count)]] if count > 1 else [])]


def whole_batch_layers(channels: int) -> dict[str, nn.Module]:
    """The layers to compare with, beside ``nn.BatchNorm2d`` on cuDNN."""
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return {
        "whole batch, native": NativeBatchNorm2d(channels, device="cuda:0"),
        "whole batch, nn.SyncBatchNorm": SyncBatchNormAlone(channels, device="cuda:0"),
    }


@dataclass
class Kernels:
    """What one step of a variant is for host and device."""

    case: str
    variant: str
    launches: int
    host: float  # seconds until the call returns
    device: float  # seconds until the last kernel ends
    bandwidth: float  # of eight passes, as a share of a copy's


def kernels(case: str, variant: str, step: Callable[[], None], x: Tensor) -> Kernels:
    """Count the launches of a step and time it; ``x`` is the whole batch."""

    def on_host() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    step()
    activities = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
    host = statistics.median(on_host() for _ in range(_STEPS))
    device = _median(step)
    target = torch.empty_like(x)
    pass_of_copy = _median(lambda: target.copy_(x)) / 2  # it reads once and writes once
    return Kernels(case, variant, launches, host, device, _PASSES * pass_of_copy / device)


def _median(step: Callable[[], object]) -> float:
    run = timed(step, "cuda")
    return statistics.median(run() for _ in range(_STEPS))


def kernel_table(found: Sequence[Kernels]) -> str:
    """Show host time, launches, and the share of a copy's bandwidth."""
    header = ["case", "variant", "launches", "host µs", "device µs", "bandwidth / copy"]
    lines = []
    for each in found:
        times = microseconds(each.host), microseconds(each.device)
        lines.append([each.case, each.variant, str(each.launches), *times, f"{each.bandwidth:.0%}"])
    return table(header, lines)


def targets(cases: Sequence[str]) -> list[Target]:
    """What the layer is to reach on one GPU; besides, 60 % of the copy bandwidth."""

    def against(what: str, limit: float, variant: str) -> Target:
        return Target(what, limit, [((case, "2 synchronized"), (case, variant)) for case in cases])

    return [
        against("R = 2 to cuDNN on the whole batch, (64,256,56,56)", 1.2, "whole batch"),
        against("R = 2 to plain ops, (64,256,56,56)", 1 / 3, "2 plain ops"),
    ]
