"""A program that uses the package as users do, for a type checker; it also runs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from syncbn_core import (
    THIS_PROCESS,
    BatchNorm2dReimpl,
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    set_sbn_eps_mode,
)


def build(channels: int) -> nn.Sequential:
    """Use a layer of every kind."""
    set_sbn_eps_mode("plus")
    return nn.Sequential(
        SynchronizedBatchNorm2d(channels, eps=1e-3, momentum=None, affine=False, process_group=THIS_PROCESS),
        SynchronizedBatchNorm(channels, eps_mode="clamp", fused=False),
        BatchNorm2dReimpl(channels),
        nn.Flatten(2),
        SynchronizedBatchNorm1d(channels, track_running_stats=False),
        nn.Unflatten(2, (2, 2, 1)),
        SynchronizedBatchNorm3d(channels, device="cpu", dtype=torch.float32),
    )


def as_torchs(layer: SynchronizedBatchNorm2d) -> nn.BatchNorm2d:
    """Pass a layer where one of torch's is expected."""
    return layer


def forward(layers: Sequence[SynchronizedBatchNorm], x: Tensor) -> Tensor:
    """Call a layer by its own method."""
    for layer in layers:
        x = layer.forward(x)
    return x


if __name__ == "__main__":
    print(
        build(3)(torch.randn(2, 3, 2, 2)).shape, forward([SynchronizedBatchNorm(3)], torch.randn(4, 3)).shape
    )
