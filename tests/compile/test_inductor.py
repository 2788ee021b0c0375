"""What Inductor makes of the graph: right numbers, and the collectives in one order in all processes.

The net has parallel branches. Nothing in their data says which of their collectives comes first, and the
processes compile for shards of different sizes.
"""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn_convert import convert_model
from syncbn_core import THIS_PROCESS
from syncbn_core._processes import collectives

pytestmark = pytest.mark.usefixtures("_needs_a_cpp_compiler")

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FEW, MANY = 50, 200  # repetitions


class Branches(nn.Module):
    """Parallel branches of different widths, joined by a sum."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))
            for width in (2, 3, 5)
        )

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


def train(world, dynamic, all_sizes, repetitions, compiling):
    torch.manual_seed(0)
    twin, model = Branches().double(), Branches().double()
    model.load_state_dict(twin.state_dict())
    called = model = convert_model(model)
    if world.rank in compiling:
        called = torch.compile(model, dynamic=dynamic, fullgraph=True)
    for repetition in range(repetitions):
        for sizes in all_sizes:
            torch.manual_seed(repetition)
            whole = torch.randn(sum(sizes), 3, 3, 3, dtype=torch.float64)
            world.assert_compiled_equals_whole_batch(called, model, twin, whole, sizes, **EXACT)


@pytest.mark.parametrize("repetitions", [FEW, pytest.param(MANY, marks=pytest.mark.full)])
def test_branches_are_right_in_every_repetition(repetitions, workers):
    workers(2).run(train, False, [[3, 5]], repetitions, [0, 1])


@pytest.mark.full
def test_branches_are_right_where_only_one_process_compiles(workers):
    workers(2).run(train, False, [[3, 5]], MANY, [1])


@pytest.mark.full
def test_one_graph_serves_shards_of_every_size(workers):
    workers(2).run(train, True, [[3, 5], [4, 2], [7, 6]], 3, [0, 1])


def train_with_sums(world):
    with mock.patch.object(collectives, "MANY", 2):
        train(world, False, [[3, 5]], 2, [0, 1])


@pytest.mark.full
def test_sums_of_many_processes_are_right(workers):
    """Inductor adds up in place: this process's own sums, for weight and bias, must not be in that memory."""
    workers(2).run(train_with_sums)


def train_with_empty_shards(world):
    torch.manual_seed(0)
    twin = nn.BatchNorm2d(4).double()
    model = convert_model(nn.BatchNorm2d(4).double())
    compiled = torch.compile(model, fullgraph=True)
    for sizes in ([0, 4], [4, 0]):
        whole = torch.randn(sum(sizes), 4, 3, 3, dtype=torch.float64)
        world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, sizes, **EXACT)


@pytest.mark.full
def test_empty_shards(workers):
    workers(2).run(train_with_empty_shards)


def with_every_option():
    """Build a net whose layers have all options, and its twin for the whole batch, by plain operations."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, eps=0.5),
    ).double()
    with torch.no_grad():
        plain[3].weight.copy_(torch.linspace(0.1, 2, 4))  # some variances below the eps that follows
    model = convert_model(copy.deepcopy(plain))
    twin = convert_model(plain, fused=False, process_group=THIS_PROCESS)
    for each in (model, twin):
        each[3].bias = None
        each[4].eps_mode = "clamp"
    return model, twin


def train_every_option(world):
    model, twin = with_every_option()
    model[2].process_group = dist.new_group([0, 1])
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for seed, sizes in enumerate([[4, 3], [6, 2], [5, 5]]):
        torch.manual_seed(seed)
        whole = torch.randn(sum(sizes), 3, 2, 2, dtype=torch.float64)
        world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, sizes, **EXACT)


@pytest.mark.full
def test_every_option_at_once_and_shards_of_every_size(workers):
    workers(2).run(train_every_option)


def train_with_autocast(world):
    model, _ = with_every_option()
    model.float()
    eager = copy.deepcopy(model)
    whole = torch.randn(7, 3, 2, 2)
    results = []
    for called, module in ((torch.compile(model, fullgraph=True), model), (eager, eager)):
        x = world.share(whole, [4, 3]).clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = called(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    ours, theirs = results
    assert ours[0].dtype == theirs[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.full
def test_halves_under_autocast_are_as_without_the_compiler(workers):
    workers(2).run(train_with_autocast)
