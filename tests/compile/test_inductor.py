"""What Inductor makes of the graph: right numbers, and the collectives in one order in all processes.

The net has parallel branches. Nothing in their data says which of their collectives comes first, and the
processes compile for shards of different sizes.
"""

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model

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
            world.assert_equals_whole_batch(called, model, twin, whole, sizes, **EXACT)


@pytest.mark.parametrize("repetitions", [FEW, pytest.param(MANY, marks=pytest.mark.full)])
def test_branches_are_right_in_every_repetition(repetitions, workers):
    workers(2).run(train, False, [[3, 5]], repetitions, [0, 1])


@pytest.mark.full
def test_branches_are_right_where_only_one_process_compiles(workers):
    workers(2).run(train, False, [[3, 5]], MANY, [1])


@pytest.mark.full
def test_one_graph_serves_shards_of_every_size(workers):
    workers(2).run(train, True, [[3, 5], [4, 2], [7, 6]], 3, [0, 1])


def train_with_empty_shards(world):
    torch.manual_seed(0)
    twin = nn.BatchNorm2d(4).double()
    model = convert_model(nn.BatchNorm2d(4).double())
    compiled = torch.compile(model, fullgraph=True)
    for sizes in ([0, 4], [4, 0]):
        whole = torch.randn(sum(sizes), 4, 3, 3, dtype=torch.float64)
        world.assert_equals_whole_batch(compiled, model, twin, whole, sizes, **EXACT)


def test_empty_shards(workers):
    workers(2).run(train_with_empty_shards)
