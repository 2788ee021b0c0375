"""If a replica fails on its device, the others get an error at once, with the first error as the cause."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simulated_accelerator.replicas import DeviceReplicas, Step
from syncbn_comm import BrokenSyncError, ReplicaLeftError
from syncbn_core import SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("accelerator")

DEVICES = ["sim:0", "sim:1", "sim:2"]


@pytest.fixture
def layer(layer_of: Callable[..., nn.Module]) -> nn.Module:
    return layer_of(SynchronizedBatchNorm2d, device="sim:0")


def inputs() -> list[Tensor]:
    return [torch.randn(2, 4, 3, 5, dtype=torch.float64, device=device) for device in DEVICES]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_before_the_layer_breaks_the_forward_of_all(failing: int, layer: nn.Module) -> None:
    batches = inputs()

    def work(replica: nn.Module, rank: int) -> Tensor:
        if rank == failing:
            raise KeyError("lost")
        return replica(batches[rank])

    outcomes = DeviceReplicas(layer, DEVICES).outcomes(work)
    for rank, outcome in enumerate(outcomes):
        if rank == failing:
            assert isinstance(outcome, KeyError)
        else:
            assert isinstance(outcome, BrokenSyncError)
            assert isinstance(outcome.__cause__, KeyError)


def test_an_input_on_another_device_than_its_replica_breaks_the_forward_of_all(layer: nn.Module) -> None:
    batches = inputs()
    batches[1] = batches[1].to("sim:3")
    with pytest.raises((BrokenSyncError, RuntimeError), match="device"):
        DeviceReplicas(layer, DEVICES).run(lambda replica, rank: replica(batches[rank]))


def test_if_a_replica_returns_early_the_others_get_an_error_at_once(layer: nn.Module) -> None:
    batches = inputs()
    with pytest.raises(ReplicaLeftError, match="net"):
        DeviceReplicas(layer, DEVICES).run(
            lambda replica, rank: batches[rank] if rank == 1 else replica(batches[rank])
        )


def test_after_a_failure_the_next_forward_is_right(layer: nn.Module) -> None:
    def fail(replica: nn.Module, x: Tensor, rank: int) -> Tensor:
        if rank == 1:
            raise KeyError("lost")
        return replica(x)

    chunks = [torch.randn(2, 4, 3, 5, dtype=torch.float64) for _ in DEVICES]
    before = {name: tensor.cpu().clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(KeyError):
        Step(layer, chunks, DEVICES, fail)
    torch.testing.assert_close({name: t.cpu() for name, t in layer.state_dict().items()}, before)
    assert Step(layer, chunks, DEVICES).gave["y"].isfinite().all()


def test_a_second_derivative_is_refused_by_name(layer: nn.Module) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    outputs = DeviceReplicas(layer, DEVICES).run(lambda replica, rank: replica(leaves[rank]))
    weights = [torch.rand_like(y).requires_grad_() for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="fused=False"):
        sum(g.square().sum().to("sim:0") for g in gradients).backward()


@pytest.mark.parametrize("introduced", [True, False], ids=["introduced", "stock nn.DataParallel"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("of", ["input", "weight"])
def test_a_gradient_inside_a_replicas_forward_is_refused(
    of: str, fused: bool, introduced: bool, layer: nn.Module
) -> None:
    layer.fused = fused
    batches = [x.requires_grad_() for x in inputs()]

    def work(replica: nn.Module, rank: int) -> Tensor:
        wanted = batches[rank] if of == "input" else layer.weight
        loss = replica(batches[rank]).square().sum()
        return torch.autograd.grad(loss, wanted, retain_graph=True)[0]

    with pytest.raises(
        RuntimeError, match=r"expected the backward of '.*' after the forward of all replicas"
    ):
        DeviceReplicas(layer, DEVICES, introduced).run(work)


def test_a_backward_after_the_forward_of_a_stock_data_parallel_is_allowed(layer: nn.Module) -> None:
    batches = [x.requires_grad_() for x in inputs()]
    replicas = DeviceReplicas(layer, DEVICES, introduced=False)
    outputs = replicas.run(lambda replica, rank: replica(batches[rank]))
    torch.autograd.backward([y.square().sum() for y in outputs])
    assert all(x.grad is not None for x in batches)
