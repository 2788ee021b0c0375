"""In DistributedDataParallel the collectives of all processes have one order, whatever their batches."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from syncbn_core import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d

EXACT = {"rtol": 1e-10, "atol": 1e-10}
OURS = {nn.BatchNorm1d: SynchronizedBatchNorm1d, nn.BatchNorm2d: SynchronizedBatchNorm2d}


def convert(model, fused):
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
            module.fused = fused
    return model


def tabular():
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2))


def images():
    blocks = [[nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU()] for c in (2, 4)]
    return nn.Sequential(*blocks[0], *blocks[1][:2])


class FirstToken(nn.Module):
    """Of one sample, ``tokens[:, 0]`` is contiguous; of several it is not."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.norm(tokens[:, 0]))


CASES = {
    "batch norm alone": (lambda: nn.Sequential(nn.BatchNorm2d(2)), (2, 5, 4)),
    "batch norm first": (tabular, (4,)),
    "convolutions first": (images, (2, 9, 8)),
    "a slice of the input": (FirstToken, (3, 4)),
}


def train(world, case, sizes, fused, options, intercepted=()):
    make, shape = CASES[case]
    twin = make().double()
    model = DistributedDataParallel(convert(twin, fused), **options)
    whole = torch.randn(sum(sizes), *shape, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        expected = twin(whole)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        (expected * weights).sum().backward()
        x = world.share(whole, sizes)
        if world.rank in intercepted:
            with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                y = model(x)
        else:
            y = model(x)
        (y * world.share(weights, sizes)).sum().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours.grad * world.size, theirs.grad, **EXACT)  # DDP's are means
        torch.testing.assert_close(model.module.state_dict(), twin.state_dict(), **EXACT)


@pytest.mark.pairwise
@pytest.mark.parametrize("options", [{}, {"bucket_cap_mb": 1e-6}], ids=["default buckets", "tiny buckets"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("sizes", [[0, 5], [1, 2], [2, 3], [4, 0, 1, 2]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_batch(case, sizes, fused, options, processes):
    processes(len(sizes)).run(train, case, sizes, fused, options)


@pytest.mark.parametrize("intercepted", [[0], [1]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_one_node_in_one_process_and_three_nodes_in_another(case, intercepted, processes):
    processes(2).run(train, case, [2, 3], True, {"bucket_cap_mb": 1e-6}, intercepted)
