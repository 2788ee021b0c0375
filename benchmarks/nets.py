"""The networks of ``model.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its normalization."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(in_channels, out_channels, stride)
        self.second = conv_norm(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_norm(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def residual_net(width: int = 32) -> nn.Module:
    """Twenty layers on the longest way: nine blocks of two, one before and one after."""
    blocks = [
        Residual(width * before, width * after, 1 + (before < after))
        for before, after in [(1, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 2), (2, 4), (4, 4), (4, 4)]
    ]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)
    return nn.Sequential(conv_norm(3, width), nn.ReLU(), *blocks, *head)


class UNet(nn.Module):
    """Down three times and up again, with a skip at each size; (N, 3, H, W) to (N, 10, H, W)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(self._twice(i, o) for i, o in zip([3, *widths], widths))
        self.up = nn.ModuleList(self._twice(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1]))
        self.head = nn.Conv2d(width, 10, 1)

    @staticmethod
    def _twice(in_channels: int, out_channels: int) -> nn.Sequential:
        first, second = conv_norm(in_channels, out_channels), conv_norm(out_channels, out_channels)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Score every pixel."""
        skips = []
        for down in self.down[:-1]:
            skips.append(down(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.down[-1](x)
        for up in self.up:
            skip = skips.pop()
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)


def chain(width: int = 8) -> nn.Module:
    """Fifteen layers in a row, each normalized."""
    body = [layer for _ in range(14) for layer in (*conv_norm(width, width), nn.ReLU())]
    return nn.Sequential(*conv_norm(3, width), nn.ReLU(), *body)
