"""On devices too, the gradients are those of the whole batch if hooks intercept the saved tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from simulated_accelerator.replicas import Step, twin_of, whole_batch_step
from syncbn_core import SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("accelerator")

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
DEVICES = pytest.mark.parametrize(
    "devices",
    [["sim:0", "sim:1"], ["sim:2", "sim:0", "sim:2"], ["sim:0", "sim:1", "sim:2", "sim:3"], ["sim:1"] * 3],
    ids=str,
)


def checkpointed(replica: nn.Module, x: Tensor, rank: int) -> Tensor:
    return checkpoint(replica, x, use_reentrant=False, preserve_rng_state=False)


def checkpointed_in_one_replica(replica: nn.Module, x: Tensor, rank: int) -> Tensor:
    return checkpointed(replica, x, rank) if rank == 1 else replica(x)


def moved_and_back(replica: nn.Module, x: Tensor, rank: int) -> Tensor:
    """Keep saved tensors on another device."""
    other = torch.device("sim", (x.device.index + 1) % 4)
    with saved_tensors_hooks(lambda t: (t.device, t.to(other)), lambda kept: kept[1].to(kept[0])):
        return replica(x)


def hooked_in_one_replica(replica: nn.Module, x: Tensor, rank: int) -> Tensor:
    return moved_and_back(replica, x, rank) if rank == 1 else replica(x)


@pytest.fixture
def net(layer_of: Callable[..., nn.Module]) -> Callable[[str], nn.Module]:
    """Build a net of two layers, with float64 on a device."""

    def build(device: str) -> nn.Module:
        return nn.Sequential(
            layer_of(SynchronizedBatchNorm2d, device=device),
            nn.Tanh(),
            layer_of(SynchronizedBatchNorm2d, device=device),
        )

    return build


@DEVICES
@pytest.mark.parametrize(
    "call", [checkpointed, checkpointed_in_one_replica, moved_and_back, hooked_in_one_replica]
)
def test_the_gradients_are_those_of_the_whole_batch(call, devices, net) -> None:
    model = net(devices[0])
    twin = nn.Sequential(twin_of(model[0], 4), nn.Tanh(), twin_of(model[2], 4))
    for sizes in ([2, 1, 3, 1], [0, 3, 1, 0]):
        chunks = [torch.randn(size, 4, 3, 5, dtype=torch.float64) * 2 + 1 for size in sizes[: len(devices)]]
        step = Step(model, chunks, devices, call)
        torch.testing.assert_close(step.gave, whole_batch_step(twin, chunks), **TIGHT)
        for counts in step.counts:
            assert (counts.reads, counts.waits) == (0, 0), counts
