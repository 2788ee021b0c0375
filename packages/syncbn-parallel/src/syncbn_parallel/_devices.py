"""Devices by number or name, which of them exist, and moving tensors between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_WITHOUT_NUMBERS = ("cpu", "meta")


def accelerator_kind() -> str:
    """Return the kind of device that a bare number means: this machine's accelerator, else ``"cuda"``."""
    accelerator = getattr(torch, "accelerator", None)  # from torch 2.6 on
    current = accelerator.current_accelerator() if accelerator is not None else None
    return "cuda" if current is None else str(current.type)


def device_module(kind: str) -> Any:
    """Return ``torch.cuda`` for ``"cuda"`` and so on; None where torch has no such module."""
    return None if kind in _WITHOUT_NUMBERS else getattr(torch, kind, None)


def as_device(device: int | str | torch.device) -> torch.device:
    """Return ``device`` as a ``torch.device`` that compares equal to that of the tensors there."""
    if isinstance(device, int):
        return torch.device(accelerator_kind(), device)
    device = torch.device(device)
    if device.type in _WITHOUT_NUMBERS:
        return torch.device(device.type)
    if device.index is None:
        module = device_module(device.type)
        try:
            current = module.current_device()
        except (AttributeError, AssertionError, RuntimeError):  # there is no device of this kind
            current = 0
        return torch.device(device.type, current)
    return device


def count_devices(kind: str) -> int | None:
    """Return how many devices of this kind the machine has; None where torch cannot tell."""
    count = getattr(device_module(kind), "device_count", None)
    return None if count is None else int(count())


def all_accelerators() -> list[torch.device]:
    """Return all devices of this machine's accelerator; an empty list where it has none."""
    kind = accelerator_kind()
    return [torch.device(kind, index) for index in range(count_devices(kind) or 0)]


def checked_devices(device_ids: Sequence[int | str | torch.device]) -> list[torch.device]:
    """Return ``device_ids`` as devices that exist and are of one kind.

    Raises:
        ValueError: a device does not exist, or they are of several kinds.
    """
    expected = "expected device_ids to be a list of devices of one kind, such as ['cpu', 'cpu'] or [0, 1]"
    if isinstance(device_ids, str) or not isinstance(device_ids, Sequence) or not device_ids:
        raise ValueError(f"{expected}, got {device_ids!r}")
    try:
        devices = list(map(as_device, device_ids))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{expected}, got {device_ids!r}: {error}") from error
    kind = devices[0].type
    if any(device.type != kind for device in devices):
        raise ValueError(f"{expected}, got {device_ids!r}")
    count = count_devices(kind)
    missing = [str(device) for device in devices if count is not None and device.index >= count]
    if missing:
        raise ValueError(
            f"expected devices that exist, got {', '.join(missing)} on a machine with {count} devices of "
            f"kind {kind!r}; for replicas on the CPU, pass device_ids=['cpu', 'cpu']"
        )
    return devices


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter or buffer; the CPU where it has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``, differentiably; the tensor itself if it is on that device."""
    # Without a wait, a copy on the CPU could be read before it is complete.
    return tensor.to(device, non_blocking=device.type != "cpu")
