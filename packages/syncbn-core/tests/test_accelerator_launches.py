"""The cost of a layer on accelerators, counted: few launches and copies, and no read by the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd.graph import Node

from simulated_accelerator.replicas import Step
from syncbn_core import SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("accelerator")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)


def layers_nodes(outputs: list[torch.Tensor]) -> set[Node]:
    """Our autograd nodes in the graph of some outputs."""
    seen: set[Node] = set()
    ahead = [y.grad_fn for y in outputs]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [behind for behind, _ in node.next_functions]
    return {node for node in seen if _package_of(node) == "syncbn_core"}


def _package_of(node: Node) -> str:
    function = getattr(type(node), "_forward_cls", type(node))
    return str(function.__module__).partition(".")[0]


@pytest.fixture
def settled(layer_of: Callable[..., nn.Module]) -> Callable[..., Step]:
    """Train a layer on R devices for two steps; return the second, when everything that is kept exists."""

    def train(replicas: int, dtype: torch.dtype, **options: object) -> Step:
        devices = [f"sim:{rank}" for rank in range(replicas)]
        parameters = torch.float32 if dtype == torch.float16 else dtype
        layer = layer_of(SynchronizedBatchNorm2d, device=devices[0], dtype=parameters, **options)
        chunks = [torch.randn(2, 4, 3, 5, dtype=dtype) for _ in devices]
        Step(layer, chunks, devices)
        return Step(layer, chunks, devices)

    return train


@DTYPES
@pytest.mark.parametrize("replicas", [2, 4])
def test_a_forward_over_devices_takes_few_launches(replicas: int, dtype: torch.dtype, settled) -> None:
    forward = settled(replicas, dtype).forward
    assert forward.total <= 5 * replicas + 4, forward
    assert (forward.reads, forward.waits) == (0, 0), forward


@DTYPES
@pytest.mark.parametrize("replicas", [2, 4])
def test_a_backward_over_devices_takes_few_launches(replicas: int, dtype: torch.dtype, settled) -> None:
    backward = settled(replicas, dtype).backward
    assert backward.total <= 5 * replicas + 3, backward
    assert (backward.reads, backward.waits) == (0, 0), backward


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_on_one_device_take_no_more(replicas: int, layer_of) -> None:
    layer = layer_of(SynchronizedBatchNorm2d, device="sim:1", dtype=torch.float32)
    chunks = [torch.randn(2, 4, 3, 5) for _ in range(replicas)]
    for _ in range(2):
        step = Step(layer, chunks, ["sim:1"] * replicas)
    assert step.forward.total <= 5 * replicas + 4, step.forward
    assert step.backward.total <= 5 * replicas + 3, step.backward


@pytest.mark.parametrize("replicas", [2, 4])
def test_a_layer_is_one_autograd_node(replicas: int, settled) -> None:
    assert len(layers_nodes(settled(replicas, torch.float32).outputs)) == 1


def test_a_change_of_the_batch_size_does_not_wait(layer_of) -> None:
    layer = layer_of(SynchronizedBatchNorm2d, device="sim:0", dtype=torch.float32)
    for sizes in ([2, 2], [3, 1], [0, 5], [2, 2]):
        step = Step(layer, [torch.randn(size, 4, 3, 5) for size in sizes], ["sim:0", "sim:1"])
        for counts in step.counts:
            assert (counts.reads, counts.waits) == (0, 0), counts
