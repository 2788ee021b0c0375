"""The streams of accelerators.

A thread has a current stream for every device. A replica's kernels run on the current stream of its own
thread, while replica 0's thread works on what all replicas have brought. So that thread takes over the other
replicas' streams for their devices. Copies between devices then wait for what they copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# torch.accelerator is there from version 2.6 on.
_streams: Any = getattr(torch, "accelerator", torch.cuda)


def current_stream(device: torch.device) -> Any:
    """Return this thread's current stream for ``device``; None where the device has none."""
    if device.type in ("cpu", "mps") or not _knows(device):
        return None
    return _streams.current_stream(device)


def is_capturing(device: torch.device) -> bool:
    """Whether this thread records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def taken_over(streams: Iterable[Any]) -> AbstractContextManager[None]:
    """Make these streams, of which some may be None, this thread's current ones for their devices."""
    others = [s for s in streams if s is not None and s != _streams.current_stream(s.device)]
    return _applied(others) if others else nullcontext()


@contextmanager
def _applied(streams: list[Any]) -> Iterator[None]:
    before = [_streams.current_stream(stream.device) for stream in streams]
    device = torch.empty(
        0, device=before[0].device.type
    ).device  # the current one, which a change of stream moves
    try:
        for stream in streams:
            _streams.set_stream(stream)
        _set_device(device)
        yield
    finally:
        for stream in before:
            _streams.set_stream(stream)
        _set_device(device)


def _set_device(device: torch.device) -> None:
    set_device = getattr(_streams, "set_device_index", None) or torch.cuda.set_device
    set_device(device.index)


def _knows(device: torch.device) -> bool:
    if _streams is torch.cuda:
        return device.type == "cuda"
    current = _streams.current_accelerator()
    return current is not None and current.type == device.type
