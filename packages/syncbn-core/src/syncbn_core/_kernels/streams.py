"""The streams of accelerators, where replicas use several.

Each thread has a current stream for each device. A replica launches its kernels on the streams of its thread.
The thread of replica 0 works on the tensors of all replicas, on its own streams. ``syncbn_parallel`` gives
all threads the caller's streams, so there is nothing to order. Otherwise events order the streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# torch.accelerator exists from version 2.6 on.
_streams: Any = getattr(torch, "accelerator", torch.cuda)


def current_stream(device: torch.device) -> Any:
    """Return this thread's current stream for ``device``; None where the device has none."""
    if device.type in ("cpu", "mps"):
        return None
    if _streams is not torch.cuda:
        accelerator = _streams.current_accelerator()
        known = accelerator is not None and accelerator.type == device.type
    else:
        known = device.type == "cuda"
    return _streams.current_stream(device) if known else None


def is_capturing(device: torch.device) -> bool:
    """Whether this thread records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def wait_for(stream: Any) -> Any:
    """Order this thread's current stream after ``stream``, which may be None; return it if they differ."""
    if stream is None:
        return None
    own = _streams.current_stream(stream.device)
    if own == stream:
        return None
    own.wait_stream(stream)
    return own


def keep_for(tensor: Tensor, stream: Any) -> None:
    """Keep the memory of ``tensor`` until ``stream``, which is not its own stream, has used it."""
    if tensor.numel():
        tensor.record_stream(stream)


@contextmanager
def across(home: torch.device, devices: Sequence[torch.device]) -> Iterator[None]:
    """Order the streams of all devices for the backward of a node that works on several.

    Autograd orders all gradients, also those on other devices, by the stream of the node's own device:
    incoming gradients are ready on that stream, and outgoing ones have to be.
    """
    own = current_stream(home)
    others = [] if own is None else [current_stream(d) for d in dict.fromkeys(devices) if d != home]
    for stream in others:
        stream.wait_stream(own)
    yield
    for stream in others:
        own.wait_stream(stream)
