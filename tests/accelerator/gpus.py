"""What tests on real GPUs share: launches and waits of a call, and processes that may have to share a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

GROUP_SECONDS = 60.0
_CALLS = ("LaunchKernel", "MemcpyAsync", "MemsetAsync")

_groups: dict[str, Any] = {}


def launches(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Call a function; return its result, and each call by which it launched a kernel, a copy or a fill."""
    activities = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        result = function()
        torch.cuda.synchronize()
    return result, [each.name for each in profile.events() if any(call in each.name for call in _CALLS)]


@contextmanager
def no_wait() -> Iterator[None]:
    """Fail where the host waits for a GPU, as far as torch can tell."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(step: Callable[[], Any], leaves: Iterable[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record a step as a CUDA graph; return the graph, and what the step returned.

    Args:
        step: a forward and a backward. It is called on another stream first, as torch requires.
        leaves: the tensors that get gradients; those of the first calls are dropped.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def group_of_gpus(rank: int, world_size: int, backend: str = "nccl") -> Any:
    """Give this process its GPU; make, once, a group of all processes.

    With fewer GPUs than processes, they share them. NCCL refuses this to two processes of one host, so each
    of them names a host of its own. They communicate by sockets then.
    """
    count = torch.cuda.device_count()
    torch.cuda.set_device(rank % count)
    if world_size > count:
        settings = {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        os.environ.update(settings)
    if backend not in _groups:
        _groups[backend] = dist.new_group(backend=backend, timeout=timedelta(seconds=GROUP_SECONDS))
    return _groups[backend]
