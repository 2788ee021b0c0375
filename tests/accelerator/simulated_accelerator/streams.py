"""Streams and their checker: what ``torch.sim`` offers under the names that ``torch.cuda`` has.

An operator fails if it uses a tensor that another stream wrote (or writes one that another stream has read)
with no event between them. The order that counts is that of events, ``wait_stream``, copies between devices,
the autograd engine's own hand-over, and the host: all that a stream has done comes before whatever is
launched after a ``synchronize`` or a read by the host.

Freed memory counts too: it goes back to the stream on which it was allocated, and whatever is allocated there
next must not be written while another stream still uses it. ``Tensor.record_stream`` keeps it until then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from simulated_accelerator.build import native

_DEVICE_TYPE = 20  # PrivateUse1, of c10::DeviceType


class Stream(torch.Stream):  # type: ignore[misc]
    """A new stream of a device: an index, a name such as "sim:1", or None for the current device."""

    def __new__(cls, device: Any = None, **kwargs: Any) -> Stream:
        """Create one; keywords are those by which torch rebuilds a stream that exists."""
        if kwargs:
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, device=device_of(device))


class Event(torch.Event):  # type: ignore[misc]
    """An event of the devices."""

    def __new__(cls, **kwargs: Any) -> Event:
        """Create one, not yet recorded."""
        return super().__new__(cls, device="sim", **kwargs)


def device_of(device: Any) -> torch.device:
    """Return the device, with its index, that an index, a name, a device or None means."""
    if isinstance(device, int):
        return torch.device("sim", device)
    device = torch.device("sim" if device is None else device)
    if device.type != "sim":
        raise ValueError(f"expected a device of type sim, got {device}")
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.device("sim", index)


def current_stream(device: Any = None) -> torch.Stream:
    """Return this thread's current stream of a device."""
    return torch.accelerator.current_stream(device_of(device))


def default_stream(device: Any = None) -> torch.Stream:
    """Return the stream that is a device's first, and every thread's current one at its start."""
    device = device_of(device)
    return torch.Stream(stream_id=0, device_index=device.index, device_type=_DEVICE_TYPE)


def set_stream(stream: torch.Stream) -> None:
    """Make a stream this thread's current one of the stream's device; the current device stays."""
    device = torch.accelerator.current_device_index()
    torch.accelerator.set_stream(stream)
    torch.accelerator.set_device_index(device)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Make a stream, and its device, this thread's current ones in a block; None changes nothing."""
    with contextlib.nullcontext() if stream is None else stream:
        yield


def synchronize(device: Any = None) -> None:
    """Let the host wait for all streams of a device."""
    torch.accelerator.synchronize(device_of(device))


@contextlib.contextmanager
def stream_checks(enabled: bool) -> Iterator[None]:
    """Switch the checks, in all threads, on or off in a block."""
    before = native().exchange_stream_checks(enabled)
    try:
        yield
    finally:
        native().exchange_stream_checks(before)
