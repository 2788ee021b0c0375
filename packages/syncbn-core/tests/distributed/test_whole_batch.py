"""Processes are one batch: outputs, gradients and running statistics are as of torch's own layer on it."""

import pytest
import torch
from torch import nn

from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}
SHAPES = [
    (SynchronizedBatchNorm1d, ()),
    (SynchronizedBatchNorm1d, (5,)),
    (SynchronizedBatchNorm2d, (3, 5)),
    (SynchronizedBatchNorm3d, (2, 3, 2)),
    (SynchronizedBatchNorm, ()),
    (SynchronizedBatchNorm, (3, 5)),
]
STOCK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
# How a layer runs: one node in all processes, three nodes in all or in some, or plain operations.
PATHS = {"one node": [], "three nodes": [0, 1, 2, 3], "both": [1, 2], "composite": []}
BY_EVERY_PATH = pytest.mark.parametrize("path", PATHS)
SPLITS = [[3, 3], [1, 5], [0, 4], [2, 2, 2, 2], [3, 0, 1, 2]]


def train(world, kind, sizes, spatial, dtype, layout, options, path, steps):
    layer = kind(4, eps=0.3, **options, fused=path != "composite", dtype=dtype)
    whole = torch.randn(sum(sizes), 4, *spatial, dtype=torch.float64) * 3 + 1
    twin = STOCK[whole.dim()](4, eps=0.3, **options, dtype=dtype)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    twin.load_state_dict(layer.state_dict())
    for _ in range(steps):
        whole = (whole * 1.5 - 1).to(dtype).to(memory_format=getattr(torch, layout))
        intercepted = world.rank in PATHS[path]
        world.assert_equals_whole_batch(layer, twin, whole, sizes, intercepted, **TOLERANCES[dtype])


@pytest.fixture
def train_as_one(processes):
    def train_as_one(
        kind,
        sizes,
        spatial,
        dtype=torch.float64,
        layout="preserve_format",
        steps=1,
        path="one node",
        **options,
    ):
        processes(len(sizes)).run(train, kind, sizes, spatial, dtype, layout, options, path, steps)

    return train_as_one


@pytest.mark.pairwise
@BY_EVERY_PATH
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("kind", "spatial"), SHAPES)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_any_split_of_any_shape_equals_the_whole_batch(sizes, kind, spatial, dtype, path, train_as_one):
    train_as_one(kind, sizes, spatial, dtype, path=path)


@pytest.mark.pairwise
@BY_EVERY_PATH
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "untracked"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("sizes", [[2, 2], [4, 0]], ids=str)
def test_every_option_equals_the_whole_batch_step_after_step(
    sizes, affine, track_running_stats, momentum, path, train_as_one
):
    train_as_one(
        SynchronizedBatchNorm2d,
        sizes,
        (3, 2),
        steps=3,
        path=path,
        affine=affine,
        track_running_stats=track_running_stats,
        momentum=momentum,
    )


@pytest.mark.pairwise
@BY_EVERY_PATH
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("kind", "spatial", "layout"),
    [
        (SynchronizedBatchNorm2d, (3, 5), "channels_last"),
        (SynchronizedBatchNorm3d, (2, 3, 5), "channels_last_3d"),
    ],
)
@pytest.mark.parametrize("sizes", [[1, 3], [2, 2, 2, 2]], ids=str)
def test_channels_last_equals_the_whole_batch(sizes, kind, spatial, layout, affine, path, train_as_one):
    train_as_one(kind, sizes, spatial, layout=layout, affine=affine, path=path)


def keep_layout(world):
    x = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = SynchronizedBatchNorm2d(4)(x)
    (y * torch.randn(2, 4, 3, 5)).sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_outputs_and_gradients_stay_channels_last(processes):
    processes(2).run(keep_layout)


def track_far_from_zero(world, layout):
    whole = torch.randn(8, 4, 6, 6) + 1e6 * torch.arange(1, 5).view(1, 4, 1, 1)
    layer = SynchronizedBatchNorm2d(4, momentum=1.0)
    twin = nn.BatchNorm2d(4).double()
    weights = torch.randn(whole.shape).double()
    exact = whole.double()
    (twin(exact) * weights).sum().backward()
    x = world.share(whole).to(memory_format=getattr(torch, layout)).requires_grad_()
    (layer(x) * world.share(weights)).sum().backward()
    torch.testing.assert_close(layer.running_var, exact.var((0, 2, 3)).float(), rtol=1e-5, atol=0.0)
    # The sums of dy * (x - mean), of an x and a mean that float32 rounds by 3 % of the standard deviation.
    torch.testing.assert_close(world.total(layer.weight.grad), twin.weight.grad.float(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_a_mean_far_from_zero_costs_no_digits_on_the_way(layout, processes):
    processes(2).run(track_far_from_zero, layout)
