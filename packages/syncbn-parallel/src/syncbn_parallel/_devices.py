"""Devices by whatever name, and tensors on their way between them."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def as_device(device: int | str | torch.device) -> torch.device:
    """Return ``device`` as a ``torch.device`` that compares equal to that of the tensors there."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return device


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter or buffer; the CPU where it has none."""
    tensors = chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``, differentiably; itself where it is there."""
    # What comes back to the CPU could be read before it has arrived, if nobody waited for it.
    return tensor.to(device, non_blocking=device.type != "cpu")
