"""Processes with simulated devices, any number in each: they equal the whole batch, with few collectives."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import simulated_accelerator
from simulated_accelerator.replicas import DeviceReplicas, Step, twin_of, weights_of, whole_batch_step
from syncbn_core import SynchronizedBatchNorm2d

EXACT = {"rtol": 1e-10, "atol": 1e-10}
GROUP_SECONDS = 20.0

pytestmark = pytest.mark.usefixtures("accelerator")


# ---- what runs in the processes

_groups: list[Any] = []


def group_of_devices() -> Any:
    """Make, once, the group that the layers and DDP use."""
    simulated_accelerator.load()
    if not _groups:
        timeout = timedelta(seconds=GROUP_SECONDS)
        _groups.append(dist.new_group(backend=simulated_accelerator.BACKEND, timeout=timeout))
    return _groups[0]


def layer_on(device: str, **options: Any) -> nn.Module:
    """Build the same layer in all processes, and in the test."""
    torch.manual_seed(0)
    layer = SynchronizedBatchNorm2d(4, **{"device": device, "dtype": torch.float64, **options})
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return layer


def devices_of(rank: int, count: int) -> list[str]:
    """Name a process's devices. No device is in two processes, unless one process has several replicas."""
    return [f"sim:{(2 * rank + replica) % 4}" for replica in range(count)]


def batches(sizes: list[list[int]], dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Make the inputs of all replicas, by process."""
    torch.manual_seed(1)
    return [[(torch.randn(size, 4, 3, 5) * 3 + 1).to(dtype) for size in each] for each in sizes]


def one_step(
    world: Any, sizes: list[list[int]], options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    devices = devices_of(world.rank, len(sizes[world.rank]))
    layer = layer_on(devices[0], process_group=group_of_devices(), **options)
    everybodys = batches(sizes, dtype)
    weights = weights_of([chunk for chunks in everybodys for chunk in chunks])
    start = sum(len(each) for each in sizes[: world.rank])
    step = Step(layer, everybodys[world.rank], devices, weights=weights[start : start + len(devices)])
    waits = [{"reads": counts.reads, "waits": counts.waits} for counts in step.counts]
    return {**step.gave, "waits of forward and backward": waits}


def launches(world: Any, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int], int]:
    parameters = torch.float32 if dtype == torch.float16 else dtype
    device = f"sim:{world.rank}"
    layer = layer_on(device, process_group=group_of_devices(), dtype=parameters)
    x = torch.randn(2, 4, 3, 5, dtype=dtype, device=device).requires_grad_()
    for _ in range(2):  # in the second, everything that is kept exists already
        x.grad = layer.weight.grad = layer.bias.grad = None
        with simulated_accelerator.counted() as forward:
            y = layer(x)
        dy = torch.randn_like(y)
        with simulated_accelerator.counted() as backward:
            y.backward(dy)
    assert (forward.reads, forward.waits, backward.reads, backward.waits) == (0, 0, 0, 0), (forward, backward)
    nodes, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            ahead += [behind for behind, _ in node.next_functions]
    own = [node for node in nodes if hasattr(type(node), "_forward_cls")]
    return dict(forward), dict(backward), len(own)


def shuffled_backwards(world: Any, devices_each: int, repetitions: int) -> None:
    devices = devices_of(world.rank, devices_each)
    group = group_of_devices()
    torch.manual_seed(0)
    model = world.Branches(lambda width: SynchronizedBatchNorm2d(width, process_group=group), devices[0])
    twin = world.Branches(nn.BatchNorm2d, "cpu")
    twin.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    for repetition in range(repetitions):
        torch.manual_seed(repetition)
        whole = torch.randn(4 * devices_each, 4, 2, 2, dtype=torch.float64)
        weights = torch.randn(whole.shape, dtype=torch.float64)
        inputs, dys = (world.share(each).chunk(devices_each) for each in (whole, weights))
        model.zero_grad()
        twin.zero_grad()
        replicas = DeviceReplicas(model, devices)
        inputs = [x.to(device) for x, device in zip(inputs, devices)]
        outputs = replicas.run(lambda replica, rank, inputs=inputs: replica(inputs[rank]))
        loss = sum((y * dy.to(y)).sum().to(devices[0]) for y, dy in zip(outputs, dys))
        assert world.shuffle_sequence(loss, repetition) == 4
        loss.backward()
        (twin(whole) * weights).sum().backward()
        ours = {name: world.total(p.grad.cpu()) for name, p in model.named_parameters()}
        torch.testing.assert_close(ours, {name: p.grad for name, p in twin.named_parameters()}, **EXACT)


def train_in_ddp(world: Any, sizes: list[int], options: dict[str, Any]) -> None:
    device = f"sim:{world.rank}"
    group = group_of_devices()

    def net(norm: Callable[..., nn.Module], **options: Any) -> nn.Sequential:
        torch.manual_seed(0)
        layers = [norm(3, **options), nn.Conv2d(3, 4, 3), norm(4, **options), nn.ReLU(), nn.Conv2d(4, 2, 1)]
        return nn.Sequential(*layers).double()

    model = net(SynchronizedBatchNorm2d, process_group=group).to(device)
    twin = net(nn.BatchNorm2d)
    ddp = DistributedDataParallel(model, device_ids=[world.rank], process_group=group, **options)
    for seed in range(3):
        torch.manual_seed(seed)
        whole = torch.randn(sum(sizes), 3, 4, 4, dtype=torch.float64)
        weights = torch.randn(sum(sizes), 2, 2, 2, dtype=torch.float64)
        x, dy = (world.share(each, sizes).to(device) for each in (whole, weights))
        ddp.zero_grad()
        twin.zero_grad()
        (ddp(x) * dy).sum().backward()
        (twin(whole) * weights).sum().backward()
        gradients = {name: p.grad.cpu() * world.size for name, p in model.named_parameters()}  # DDP's average
        torch.testing.assert_close(gradients, {name: p.grad for name, p in twin.named_parameters()}, **EXACT)
        buffers = {name: b.cpu() for name, b in model.named_buffers()}
        torch.testing.assert_close(buffers, dict(twin.named_buffers()), **EXACT)


# ---- the tests


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize(
    "sizes",
    [[[2], [3]], [[0], [4]], [[1], [1]], [[2, 1], [3, 2]], [[0, 0], [1, 3]], [[1, 0], [0, 1]], [[1], [2, 0]]],
    ids=str,
)
def test_processes_of_devices_equal_the_whole_batch(sizes: list[list[int]], fused: bool, processes) -> None:
    assert_whole_batch(processes(2), sizes, {"fused": fused}, torch.float64, EXACT)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_every_option_equals_the_whole_batch(options: dict[str, Any], processes) -> None:
    assert_whole_batch(processes(2), [[2, 1], [0, 2]], options, torch.float64, EXACT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, {"rtol": 1e-4, "atol": 1e-4}), (torch.bfloat16, {"rtol": 0.06, "atol": 0.15})],
    ids=["float32", "bfloat16"],
)
def test_every_dtype_equals_the_whole_batch(
    dtype: torch.dtype, tolerance: dict[str, float], processes
) -> None:
    assert_whole_batch(processes(2), [[2, 1], [0, 2]], {"dtype": torch.float32}, dtype, tolerance)


def assert_whole_batch(
    processes: Any,
    sizes: list[list[int]],
    options: dict[str, Any],
    dtype: torch.dtype,
    tolerance: dict[str, float],
) -> None:
    parts = processes.run(one_step, sizes, options, dtype)
    waits = [part.pop("waits of forward and backward") for part in parts]
    twin = twin_of(layer_on("cpu", **options), 4)
    expected = whole_batch_step(twin, [chunk for chunks in batches(sizes, dtype) for chunk in chunks])
    together = {
        name: torch.cat([part[name] for part in parts])
        if name in ("y", "dx")
        else sum(part[name] for part in parts)
        for name in expected
        if name in ("y", "dx") or name.startswith("d ")
    }
    for part in parts:  # the running statistics are the same everywhere
        buffers = {name: part[name] for name in expected if name not in together}
        torch.testing.assert_close({**together, **buffers}, expected, check_dtype=False, **tolerance)
    assert waits == [[{"reads": 0, "waits": 0}] * 2] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_process_of_one_device_takes_few_launches(dtype: torch.dtype, processes) -> None:
    for forward, backward, nodes in processes(2).run(launches, dtype):
        assert sum(forward.values()) <= 9, forward
        assert sum(backward.values()) <= 5, backward
        assert nodes == 1


@pytest.mark.parametrize("devices_each", [1, 2])
def test_the_backward_is_right_in_whatever_order_its_nodes_are_ready(devices_each: int, processes) -> None:
    processes(2).run(shuffled_backwards, devices_each, 10)


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3], [0, 5]], ids=str)
def test_ddp_trains_as_the_whole_batch(sizes: list[int], processes) -> None:
    processes(2).run(train_in_ddp, sizes, {})


def test_ddp_with_gradients_as_views_of_its_buckets_trains_as_the_whole_batch(processes) -> None:
    processes(2).run(train_in_ddp, [2, 3], {"gradient_as_bucket_view": True})
