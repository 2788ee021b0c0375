"""The streams of accelerators, where replicas use several.

Each thread has a current stream for each device. A replica launches its kernels on its own thread's streams.
Replica 0's thread works on the tensors of all replicas, on its own streams. ``syncbn_parallel`` gives all
threads the caller's streams, so there is nothing to do. Elsewhere events order the streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# torch.accelerator is there from version 2.6 on.
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


@contextmanager
def ordered(streams: Sequence[Any]) -> Iterator[list[Any]]:
    """Order this thread's streams after those of the replicas, and afterwards these after this thread's.

    Yields:
        For each replica's stream: this thread's stream for the same device, if it is another one; else None.
    """
    own = [wait_for(stream) for stream in streams]
    yield own
    for stream, mine in zip(streams, own):
        if mine is not None:
            stream.wait_stream(mine)


def keep_for(tensor: Tensor, stream: Any) -> None:
    """Keep the memory of ``tensor`` until ``stream``, another one than its own, has used it."""
    if tensor.numel():
        tensor.record_stream(stream)


@contextmanager
def across(home: torch.device, devices: Sequence[torch.device]) -> Iterator[None]:
    """Order the streams of all devices for the backward of a node that works on several.

    Autograd orders gradients, those on other devices too, by the stream of the node's own device alone: what
    comes in is ready there, and what goes out has to be.
    """
    own = current_stream(home)
    others = [] if own is None else [current_stream(d) for d in dict.fromkeys(devices) if d != home]
    for stream in others:
        stream.wait_stream(own)
    yield
    for stream in others:
        own.wait_stream(stream)
