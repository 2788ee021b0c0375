"""Processes with GPUs, over NCCL: they equal the whole batch, with few launches, and the host never waits."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpus import group_of_gpus, launches, no_wait
from syncbn_core import SynchronizedBatchNorm2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="torch is built without NCCL"),
]

EXACT = {"rtol": 1e-10, "atol": 1e-10}


# ---- what runs in the processes


def group_of(world, backend="nccl"):
    return group_of_gpus(world.rank, world.size, backend)


def layers(channels=4, **options):
    """Build a layer, and torch's own for the whole batch, on this process's GPU."""
    torch.manual_seed(0)
    shared = {"device": "cuda", "dtype": options.pop("dtype", torch.float64)}
    build = {key: options[key] for key in options.keys() - {"fused", "process_group"}}
    twin = nn.BatchNorm2d(channels, **build, **shared)
    for tensor in twin.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    layer = SynchronizedBatchNorm2d(channels, **options, **shared)
    layer.load_state_dict(twin.state_dict())
    return layer, twin


def batch_of(sizes, dtype=torch.float64, layout=torch.contiguous_format):
    whole = torch.randn(sum(sizes), 4, 5, 3) * 3 + 1
    return whole.to("cuda", dtype).contiguous(memory_format=layout)


def train(world, sizes, backend, options, dtype, layout, tolerance):
    layer, twin = layers(process_group=group_of(world, backend), **options)
    for seed in range(3):
        torch.manual_seed(seed)
        world.assert_equals_whole_batch(layer, twin, batch_of(sizes, dtype, layout), sizes, **tolerance)


def step_of(world, dtype):
    layer, _ = layers(dtype=torch.float32, process_group=group_of(world))
    x = batch_of([2], dtype).requires_grad_()
    dy = torch.randn_like(x)

    def forward():
        x.grad = layer.weight.grad = layer.bias.grad = None
        return layer(x)

    forward().backward(dy)  # one-time setup, such as NCCL's, may wait
    return forward, dy


def train_without_waits(world, dtype):
    forward, dy = step_of(world, dtype)
    with no_wait():
        forward().backward(dy)


def launches_of_a_step(world, dtype):
    forward, dy = step_of(world, dtype)
    y, of_forward = launches(forward)
    _, of_backward = launches(lambda: y.backward(dy))
    return of_forward, of_backward


def branches(world):
    group = group_of(world)
    twin = world.Branches(nn.BatchNorm2d, "cuda")
    model = world.Branches(lambda width: SynchronizedBatchNorm2d(width, process_group=group), "cuda")
    model.load_state_dict(twin.state_dict())
    return model, twin


def shuffled_backwards(world, repetitions):
    model, twin = branches(world)
    for repetition in range(repetitions):
        torch.manual_seed(repetition)
        whole, weights = (torch.randn(4, 4, 2, 2, dtype=torch.float64, device="cuda") for _ in range(2))
        model.zero_grad()
        twin.zero_grad()
        loss = (model(world.share(whole)) * world.share(weights)).sum()
        assert world.shuffle_sequence(loss, repetition) == 4
        loss.backward()
        (twin(whole) * weights).sum().backward()
        gradients = {name: p.grad for name, p in twin.named_parameters()}
        torch.testing.assert_close(world.total_gradients(model), gradients, **EXACT)


def train_in_ddp(world, sizes, options):
    model, twin = branches(world)
    ddp = DistributedDataParallel(model, process_group=group_of(world), **options)
    for seed in range(3):
        torch.manual_seed(seed)
        whole, weights = (torch.randn(sum(sizes), 4, 2, 2, dtype=torch.float64).cuda() for _ in range(2))
        ddp.zero_grad()
        twin.zero_grad()
        (ddp(world.share(whole, sizes)) * world.share(weights, sizes)).sum().backward()
        (twin(whole) * weights).sum().backward()
        gradients = {name: p.grad / world.size for name, p in twin.named_parameters()}  # DDP's are means
        ours = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(ours, gradients, **EXACT)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), **EXACT)


# ---- the tests


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("sizes", [[2, 3], [0, 4], [1, 1]], ids=str)
def test_processes_of_gpus_equal_the_whole_batch(sizes, backend, fused, processes):
    arguments = ({"fused": fused}, torch.float64, torch.contiguous_format, EXACT)
    processes(2).run(train, sizes, backend, *arguments)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_every_option_equals_the_whole_batch(options, processes):
    processes(2).run(train, [3, 2], "nccl", options, torch.float64, torch.contiguous_format, EXACT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.15)],
    ids=["float32", "float16", "bfloat16"],
)
def test_every_dtype_and_layout_equals_the_whole_batch(dtype, tolerance, layout, processes):
    tolerances = {"rtol": tolerance, "atol": tolerance}
    processes(2).run(train, [3, 2], "nccl", {"dtype": torch.float32}, dtype, layout, tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_step_makes_the_host_wait_for_the_device(dtype, processes):
    processes(2).run(train_without_waits, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_takes_few_launches(dtype, processes):
    for forward, backward in processes(2).run(launches_of_a_step, dtype):
        assert len(forward) <= 9, forward
        assert len(backward) <= 5, backward


def test_the_backward_is_right_in_whatever_order_its_nodes_are_ready(processes):
    processes(2).run(shuffled_backwards, 20)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}, {"static_graph": True}], ids=str
)
@pytest.mark.parametrize("sizes", [[2, 2], [0, 5]], ids=str)
def test_ddp_trains_as_the_whole_batch(sizes, options, processes):
    processes(2).run(train_in_ddp, sizes, options)


def test_many_processes_send_sums(processes):
    sizes = [2, 0, 1, 3, 1, 1, 0, 2, 1]
    arguments = ({}, torch.float64, torch.contiguous_format, {"rtol": 1e-9, "atol": 1e-9})
    processes(len(sizes)).run(train, sizes, "nccl", *arguments)
