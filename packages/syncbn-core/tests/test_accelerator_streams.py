"""Replicas on streams of the user: every use of a tensor comes after the operation that wrote it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simulated_accelerator.replicas import DeviceReplicas, twin_of, weights_of
from syncbn_core import SynchronizedBatchNorm2d

pytestmark = [
    pytest.mark.usefixtures("accelerator"),
    # torch warns that a parameter is used on another stream than at its last use.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning"),
]

DEVICES = pytest.mark.parametrize(
    "devices", [["sim:0", "sim:1"], ["sim:2", "sim:0", "sim:2"], ["sim:1", "sim:1"]], ids=str
)
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])


def directly(replica: nn.Module, x: Tensor) -> Tensor:
    return replica(x)


def checkpointed(replica: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(replica, x, use_reentrant=False, preserve_rng_state=False)


@pytest.fixture
def net(layer_of: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(device: str, fused: bool) -> nn.Module:
        layers = [layer_of(SynchronizedBatchNorm2d, device=device, fused=fused) for _ in range(2)]
        return nn.Sequential(layers[0], nn.Tanh(), layers[1])

    return build


def step_on_streams(model: nn.Module, chunks: list[Tensor], devices: list[str], call) -> dict[str, Tensor]:
    """Each replica works on a stream of its own; the caller only does what CUDA requires."""
    current = [torch.sim.current_stream(device) for device in devices]
    streams = [torch.sim.Stream(device) for device in devices]
    leaves = [chunk.to(device).requires_grad_() for chunk, device in zip(chunks, devices)]
    replicas = DeviceReplicas(model, devices)
    for stream, before in zip(streams, current):
        stream.wait_stream(before)

    def work(replica: nn.Module, rank: int) -> Tensor:
        with torch.sim.stream(streams[rank]):
            return call(replica, leaves[rank] * 1.0)

    outputs = replicas.run(work)
    for stream, before in zip(streams, current):
        before.wait_stream(stream)
    weights = [w.to(y) for w, y in zip(weights_of(outputs), outputs)]
    torch.autograd.backward(outputs, weights)
    return {
        "y": torch.cat([y.detach().cpu() for y in outputs]),
        "dx": torch.cat([x.grad.cpu() for x in leaves]),
        **{name: p.grad.cpu() for name, p in model.named_parameters()},
        **{name: b.cpu() for name, b in model.named_buffers()},
    }


@FUSED
@DEVICES
def test_streams_of_replicas_are_ordered_by_events(devices, fused, net) -> None:
    assert_whole_batch(net(devices[0], fused), devices, directly)


@DEVICES
def test_streams_of_checkpointed_replicas_are_ordered_by_events(devices, net) -> None:
    assert_whole_batch(net(devices[0], True), devices, checkpointed)


def assert_whole_batch(model: nn.Module, devices: list[str], call) -> None:
    chunks = [torch.randn(rank + 1, 4, 3, 5, dtype=torch.float64) for rank in range(len(devices))]
    twin = nn.Sequential(twin_of(model[0], 4), nn.Tanh(), twin_of(model[2], 4))
    ours = step_on_streams(model, chunks, devices, call)
    whole = torch.cat(chunks).requires_grad_()
    y = twin(whole)
    y.backward(torch.cat(weights_of(y.split([len(chunk) for chunk in chunks]))))
    theirs = {
        "y": y.detach(),
        "dx": whole.grad,
        **{name: p.grad for name, p in twin.named_parameters()},
        **dict(twin.named_buffers()),
    }
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
