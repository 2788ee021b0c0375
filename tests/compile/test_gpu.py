"""Compiled for a GPU, by Inductor and Triton: one graph, alone and over processes, and CUDA graphs of it."""

import copy

import pytest
import torch
from torch import nn

from gpus import group_of_gpus, no_wait
from syncbn_convert import convert_model
from syncbn_core import SynchronizedBatchNorm2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of the compiler itself, as the fixture resets it
]

EXACT = {"rtol": 1e-9, "atol": 1e-9}
OPTIONS = {
    "plain": {},
    "clamp": {"eps_mode": "clamp", "eps": 0.5},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 1), norm(4, momentum=None)]
    return nn.Sequential(*layers).to("cuda", torch.float64)


def step(called, module, x):
    x = x.clone().requires_grad_()
    y = called(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)).sum().backward()
    return [y.detach().clone(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def train_layer(world, options):
    layer = SynchronizedBatchNorm2d(3, **options, device="cuda", dtype=torch.float64)
    compare(torch.compile(layer, fullgraph=True), layer, (5, 3, 4, 4), 2)


def train_with_cuda_graphs(world):
    model = net(SynchronizedBatchNorm2d)
    compare(torch.compile(model, fullgraph=True, mode="reduce-overhead"), model, (5, 3, 6, 6), 4)


def compare(compiled, model, shape, steps):
    twin = copy.deepcopy(model)
    for seed in range(steps):
        torch.manual_seed(seed)
        x = torch.randn(shape, dtype=torch.float64, device="cuda")
        model.zero_grad()
        twin.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(step(compiled, model, x), step(twin, twin, x), **EXACT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_layer_alone_equals_the_eager_one(options, workers):
    workers(1).run(train_layer, options)


def test_cuda_graphs_of_a_net_equal_the_eager_net(workers):
    workers(1).run(train_with_cuda_graphs)


def train(world, dynamic, compiling, mode=None):
    model, twin = convert_model(net(), process_group=group_of_gpus(world.rank, world.size)), net()
    compiles = world.rank in compiling
    called = torch.compile(model, fullgraph=True, dynamic=dynamic, mode=mode) if compiles else model
    for seed, sizes in enumerate([[4, 4], [3, 5], [4, 4]] if dynamic else [[3, 5]] * 4):
        torch.manual_seed(seed)
        whole = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        world.assert_compiled_equals_whole_batch(called, model, twin, whole, sizes, **EXACT)


@pytest.mark.parametrize("compiling", [[0, 1], [1]], ids=["all", "one of two"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_processes_over_nccl_equal_the_whole_batch(dynamic, compiling, workers):
    workers(2).run(train, dynamic, compiling)


def train_without_waits(world):
    model = convert_model(net(), process_group=group_of_gpus(world.rank, world.size))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    dy = torch.randn(3, 4, 4, 4, dtype=torch.float64, device="cuda")
    for _ in range(2):  # to compile may wait
        compiled(x).backward(dy)
    with no_wait():
        compiled(x).backward(dy)


def test_a_compiled_step_over_nccl_does_not_make_the_host_wait(workers):
    workers(2).run(train_without_waits)


def test_cuda_graphs_of_processes_over_nccl_equal_the_whole_batch(workers):
    workers(2).run(train, False, [0, 1], "reduce-overhead")
