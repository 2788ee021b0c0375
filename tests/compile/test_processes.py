"""A compiled model over processes trains as one on the whole batch, in one graph."""

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def net(**options):
    """Build a net of (N, 3, 6, 6) to (N, 5), the same one each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.BatchNorm1d(5, affine=False),
    ).double()


def train(world, backend, dynamic, sizes, options):
    twin = net()
    model = convert_model(net(), **options)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for step in range(3):
        torch.manual_seed(step)
        whole = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64)
        world.assert_equals_whole_batch(compiled, model, twin, whole, sizes, **EXACT)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sizes", [[6, 6], [1, 5], [0, 4], [3, 2, 4, 3]], ids=str)
def test_every_step_is_that_of_the_whole_batch(sizes, dynamic, backend, workers):
    workers(len(sizes)).run(train, backend, dynamic, sizes, {})
