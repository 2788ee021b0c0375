"""In evaluation, and in training without other replicas, a layer is torch's batch norm, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

pytestmark = pytest.mark.usefixtures("graph_kind")

EXACTLY = {"rtol": 0, "atol": 0}
KINDS = pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (SynchronizedBatchNorm1d, (4, 3)),
        (SynchronizedBatchNorm1d, (4, 3, 5)),
        (SynchronizedBatchNorm2d, (4, 3, 5, 2)),
        (SynchronizedBatchNorm3d, (4, 3, 2, 3, 2)),
        (SynchronizedBatchNorm, (4, 3)),
        (SynchronizedBatchNorm, (4, 3, 5, 2)),
    ],
)
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"fused": False}],
    ids=str,
)


@pytest.mark.pairwise
@KINDS
@OPTIONS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("in_a_replica", [True, False], ids=["one replica", "no replica"])
def test_one_batch_alone_is_torchs_own(
    kind, shape, options, training, in_a_replica, randomize, stock_twin, train_step, run_replicas
):
    layer = randomize(kind(3, **options)).train(training)
    twin = stock_twin(layer, len(shape)).train(training)
    chunks = [torch.randn(shape)]

    def alone(model, inputs):
        return [model(*inputs)]

    ours = train_step(layer, chunks, run_replicas if in_a_replica else alone)
    torch.testing.assert_close(ours, train_step(twin, chunks, alone), **EXACTLY)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_evaluation_in_several_replicas_does_not_wait(fused, randomize, replicas_of):
    layer = randomize(SynchronizedBatchNorm2d(3, fused=fused)).eval()
    replicas = replicas_of(layer, 3)
    x = torch.randn(2, 3, 4, 4)
    # One replica runs without the others: if it synchronized, it would wait.
    y = replicas.modules[1](x)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected, **EXACTLY)


def test_evaluation_without_running_statistics_uses_the_replicas_own_batch(replicas_of):
    layer = SynchronizedBatchNorm2d(3, track_running_stats=False).eval()
    x = torch.randn(2, 3, 4, 4)
    y = replicas_of(layer, 3).modules[1](x)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, layer.weight, layer.bias, True), **EXACTLY)


@pytest.mark.pairwise
@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("replicas", [0, 1, 2])
def test_an_empty_batch_gives_an_empty_output_and_updates_no_statistics(
    replicas, fused, shape, eps_mode, randomize, run_replicas
):
    layer = randomize(SynchronizedBatchNorm2d(3, fused=fused, eps_mode=eps_mode))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    inputs = [torch.empty(shape, requires_grad=True) for _ in range(max(replicas, 1))]
    outputs = run_replicas(layer, inputs) if replicas else [layer(*inputs)]
    sum(y.sum() for y in outputs).backward()
    assert all(y.shape == shape for y in outputs)
    assert all(x.grad.shape == shape for x in inputs)
    for parameter in layer.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros(3), **EXACTLY)
    # A layer that does not synchronize does the same as torch's own, which counts the batch.
    before["num_batches_tracked"] += int(replicas < 2 and eps_mode == "plus")
    torch.testing.assert_close(dict(layer.state_dict()), before, **EXACTLY)


def test_a_layer_is_an_instance_of_torchs_own_class():
    assert isinstance(SynchronizedBatchNorm1d(3), nn.BatchNorm1d)
    assert isinstance(SynchronizedBatchNorm2d(3), nn.BatchNorm2d)
    assert isinstance(SynchronizedBatchNorm3d(3), nn.BatchNorm3d)
    assert isinstance(SynchronizedBatchNorm(3), nn.modules.batchnorm._BatchNorm)
