"""Invalid input is an error that says what was expected, got and where; then the model still works."""

import re

import pytest
import torch
from torch import nn

from syncbn_comm import BrokenSyncError
from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    set_sbn_eps_mode,
)

pytestmark = pytest.mark.usefixtures("graph_kind")

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
WRONG_DIMS = [
    (
        SynchronizedBatchNorm1d,
        (2, 3, 4, 4),
        "expected 2D or 3D input at '{}', got 4D input of shape (2, 3, 4, 4)",
    ),
    (SynchronizedBatchNorm2d, (2, 3, 4), "expected 4D input at '{}', got 3D input of shape (2, 3, 4)"),
    (SynchronizedBatchNorm3d, (2, 3), "expected 5D input at '{}', got 2D input of shape (2, 3)"),
    (SynchronizedBatchNorm, (3,), "expected 2D or 3D or 4D or 5D input at '{}', got 1D input of shape (3,)"),
]


@pytest.mark.parametrize("num_features", [0, -1])
def test_a_layer_needs_a_channel(num_features):
    with pytest.raises(ValueError, match=f"expected num_features of at least 1, got {num_features}"):
        SynchronizedBatchNorm2d(num_features)


def test_an_unknown_eps_mode_is_an_error_that_lists_the_known_ones():
    expected = "expected eps_mode to be one of 'plus', 'clamp', 'clamp_synchronized', got 'minus'"
    with pytest.raises(ValueError, match=expected):
        SynchronizedBatchNorm2d(3, eps_mode="minus")
    with pytest.raises(ValueError, match=expected):
        set_sbn_eps_mode("minus")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("kind", "shape", "message"), WRONG_DIMS)
def test_an_input_of_other_dimensions(kind, shape, message, training):
    layer = kind(3).train(training)
    with pytest.raises(ValueError, match=re.escape(message.format(kind.__name__))):
        layer(torch.ones(shape))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_input_of_other_channels(training):
    layer = SynchronizedBatchNorm2d(3).train(training)
    message = (
        "expected 3 channels (num_features) at 'SynchronizedBatchNorm2d', got 4 in an input of shape (2, 4"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(torch.ones(2, 4, 5, 5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_an_input_that_is_not_of_floating_point(dtype):
    with pytest.raises(TypeError, match=f"expected a floating-point input at '.*2d', got {dtype}"):
        SynchronizedBatchNorm2d(3)(torch.ones(2, 3, 4, 4).to(dtype))


def test_an_error_names_the_layer(replicas_of):
    wrong = torch.ones(2, 3)
    layer = SynchronizedBatchNorm2d(3)
    layer.layer_name = "encoder.bn1"
    with pytest.raises(ValueError, match=r"input at 'encoder\.bn1', got"):
        layer(wrong)
    with pytest.raises(ValueError, match=r"input at 'net\.0', got"):
        replicas_of(nn.Sequential(layer), 2).modules[0](wrong)


@pytest.mark.pairwise
@FUSED
@pytest.mark.parametrize("replicas", [0, 1, 3], ids=["alone", "one replica", "three replicas"])
def test_one_value_per_channel_in_all_replicas_together(replicas, fused, run_replicas):
    layer = SynchronizedBatchNorm1d(3, fused=fused)
    chunks = [torch.ones(1, 3), *[torch.ones(0, 3)] * (replicas - 1)]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got"):
        run_replicas(layer, chunks) if replicas else layer(*chunks)
    if replicas > 1:  # torch's own layer has counted the batch before its error
        assert layer.num_batches_tracked == 0


@pytest.mark.pairwise
@FUSED
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(2, 3, 4, 4).half(), TypeError, r"one dtype in all replicas at 'net.0', got .*float16"),
        (
            torch.ones(2, 3, 4, 4).double(),
            RuntimeError,
            r"dtype of 'weight' at 'net.0' \(torch.float32\), .* got torch.float64: convert",
        ),
        (torch.ones(2, 4, 4, 4), ValueError, r"expected 3 channels \(num_features\) at 'net.0', got 4"),
        (torch.ones(2, 3, 4), ValueError, r"expected 4D input at 'net.0', got 3D"),
        (
            torch.ones(2, 3, 4, 4).int(),
            TypeError,
            r"expected a floating-point input at 'net.0', got torch.int32",
        ),
    ],
    ids=["another dtype", "a dtype that the layer has not", "channels", "dimensions", "integers"],
)
def test_a_bad_batch_in_one_replica_is_an_error_for_all_and_the_model_goes_on(
    bad, error, message, culprit, fused, replicas_of, assert_equals_whole_batch
):
    model = nn.Sequential(SynchronizedBatchNorm2d(3, fused=fused))
    inputs = [torch.ones(2, 3, 4, 4) for _ in range(3)]
    inputs[culprit] = bad
    replicas = replicas_of(model, 3)
    outcomes = replicas.outcomes(lambda replica, rank: replica(inputs[rank]))

    assert type(replicas.group.failure) is error
    with pytest.raises(error, match=message):
        raise replicas.group.failure
    for outcome in outcomes:
        if outcome is not replicas.group.failure:
            assert isinstance(outcome, BrokenSyncError)
            assert outcome.__cause__ is replicas.group.failure
    fresh = SynchronizedBatchNorm2d(3)
    torch.testing.assert_close(model[0].state_dict(), fresh.state_dict(), rtol=0, atol=0)
    assert_equals_whole_batch(model[0], [torch.randn(n, 3, 4, 4) for n in (2, 1)])


def test_a_wrapper_inside_another_is_an_error(replicas_of):
    model = nn.Sequential(SynchronizedBatchNorm2d(3))
    outer = replicas_of(model, 2)
    inner = replicas_of(outer.modules[0], 2)
    with pytest.raises(
        RuntimeError, match=r"expected one data-parallel wrapper around 'net.0', got one inside"
    ):
        inner.run(lambda replica, rank: replica(torch.ones(2, 3, 4, 4)))
    assert model[0].num_batches_tracked == 0
    outer.run(lambda replica, rank: replica(torch.ones(2, 3, 4, 4)))
    assert model[0].num_batches_tracked == 1


@FUSED
def test_a_failure_after_a_layer_does_not_change_it_and_the_next_forward_is_right(
    fused, replicas_of, assert_equals_whole_batch
):
    model = nn.Sequential(SynchronizedBatchNorm2d(3, fused=fused), SynchronizedBatchNorm2d(3, fused=fused))
    boom = ValueError("boom")

    def forward(replica, rank):
        y = replica[0](torch.randn(2, 3, 4, 4))
        if rank == 1:
            raise boom
        return replica[1](y)

    first, second, third = replicas_of(model, 3).outcomes(forward)
    assert second is boom is first.__cause__ is third.__cause__
    assert [layer.num_batches_tracked.item() for layer in model] == [1, 0]
    for layer in model:
        assert_equals_whole_batch(layer, [torch.randn(n, 3, 4, 4) for n in (2, 1)])
