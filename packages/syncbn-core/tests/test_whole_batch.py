"""Replicas are one batch: outputs, gradients and running statistics are as of torch's own layer on it."""

import pytest
import torch

from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

pytestmark = pytest.mark.usefixtures("graph_kind")

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SPLITS = [
    *([3],),
    *([2, 2], [1, 3], [0, 4]),
    *([2, 2, 2], [1, 2, 3], [0, 1, 4]),
    *([2, 2, 2, 2], [3, 1, 2, 1], [0, 2, 0, 3]),
    *([1] * 8, [3, 1, 2, 1, 1, 2, 1, 1], [0, 1, 0, 2, 0, 1, 3, 0]),
]
SHAPES = [
    (SynchronizedBatchNorm1d, ()),
    (SynchronizedBatchNorm1d, (5,)),
    (SynchronizedBatchNorm2d, (3, 5)),
    (SynchronizedBatchNorm3d, (2, 3, 2)),
    (SynchronizedBatchNorm, ()),
    (SynchronizedBatchNorm, (5,)),
    (SynchronizedBatchNorm, (3, 5)),
    (SynchronizedBatchNorm, (2, 3, 2)),
]


def chunks_of(split, spatial, **options):
    return [torch.randn(size, 4, *spatial, **options) * 3 + 1 for size in split]


@pytest.mark.pairwise
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "spatial"), SHAPES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_any_split_of_any_shape_equals_the_whole_batch(
    split, kind, spatial, dtype, fused, randomize, assert_equals_whole_batch
):
    layer = randomize(kind(4, fused=fused, dtype=dtype))
    chunks = chunks_of(split, spatial, dtype=dtype)
    assert_equals_whole_batch(layer, chunks, **TIGHT if dtype is torch.float64 else {})


@pytest.mark.pairwise
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "untracked"])
@pytest.mark.parametrize("parameters", [{}, {"bias": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("split", [[4], [2, 2], [3, 0, 1]], ids=str)
def test_every_option_equals_the_whole_batch_step_after_step(
    split, parameters, track_running_stats, momentum, fused, randomize, assert_equals_whole_batch
):
    options = {"track_running_stats": track_running_stats, "momentum": momentum, **parameters}
    layer = randomize(SynchronizedBatchNorm2d(4, eps=0.3, fused=fused, dtype=torch.float64, **options))
    for _ in range(3):
        chunks = chunks_of(split, (3, 2), dtype=torch.float64)
        assert_equals_whole_batch(layer, chunks, **TIGHT)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_one_sample_per_replica_is_enough(fused, randomize, assert_equals_whole_batch):
    layer = randomize(SynchronizedBatchNorm1d(4, fused=fused, dtype=torch.float64))
    chunks = chunks_of([1, 1], (), dtype=torch.float64)
    # For two values, dx is a difference of numbers a thousand times its size.
    assert_equals_whole_batch(layer, chunks, rtol=1e-9, atol=1e-12)


@pytest.mark.pairwise
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize(
    ("kind", "spatial", "memory_format"),
    [
        (SynchronizedBatchNorm2d, (3, 5), torch.channels_last),
        (SynchronizedBatchNorm3d, (2, 3, 2), torch.channels_last_3d),
    ],
    ids=["2d", "3d"],
)
def test_channels_last_stays_channels_last(
    kind, spatial, memory_format, fused, randomize, assert_equals_whole_batch, run_replicas
):
    layer = randomize(kind(4, fused=fused, dtype=torch.float64))
    chunks = [
        chunk.contiguous(memory_format=memory_format).requires_grad_()
        for chunk in chunks_of([2, 3], spatial, dtype=torch.float64)
    ]
    assert_equals_whole_batch(layer, chunks, **TIGHT)
    outputs = run_replicas(layer, chunks)
    sum((y**3).sum() for y in outputs).backward()
    for tensor in outputs + [chunk.grad for chunk in chunks]:
        assert tensor.is_contiguous(memory_format=memory_format)


@pytest.mark.pairwise
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("half_layer", [True, False], ids=["half layer", "float32 layer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_give_half_outputs(dtype, half_layer, fused, randomize, assert_equals_whole_batch):
    layer = randomize(SynchronizedBatchNorm2d(4, fused=fused, dtype=dtype if half_layer else None))
    chunks = chunks_of([2, 3], (6, 5), dtype=dtype)
    roundings = 4 * torch.finfo(dtype).eps  # for numbers of order 1
    ours = assert_equals_whole_batch(layer, chunks, rtol=roundings, atol=roundings)
    assert ours["y"].dtype == ours["dx"].dtype == dtype


@pytest.mark.pairwise
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_of_half_inputs_have_the_digits_of_float32(dtype, memory_format, fused, run_replicas):
    layer = SynchronizedBatchNorm2d(4, momentum=1.0, fused=fused)
    chunks = [
        chunk.contiguous(memory_format=memory_format) for chunk in chunks_of([2, 3], (16, 15), dtype=dtype)
    ]
    run_replicas(layer, chunks)
    batch = torch.cat(chunks).double()
    torch.testing.assert_close(layer.running_mean.double(), batch.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), batch.var((0, 2, 3)), rtol=1e-5, atol=0)
