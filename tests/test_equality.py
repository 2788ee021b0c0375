"""A converted model on replicas is the model on the whole batch: outputs, gradients, running statistics."""

import copy

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model

EXACT = {"rtol": 1e-12, "atol": 1e-12}

SPLITS = [
    *([3] * replicas for replicas in (2, 3, 4, 8)),
    *([1] * replicas for replicas in (2, 3, 4, 8)),
    *([5, 1], [1, 2, 4], [4, 1, 3, 2], [1, 3, 2, 5, 1, 1, 4, 2]),
    *([4, 0], [0, 2, 4], [0, 0, 3, 2], [1, 0, 2, 0, 0, 1, 4, 2]),
]

LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "1d-length": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "2d": (lambda: nn.BatchNorm2d(4), (4, 3, 5)),
    "3d": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 2)),
    "no-affine": (lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 5)),
    "cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (4, 3, 5)),
    "no-running-statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 3, 5)),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_layer_on_replicas_equals_the_whole_batch(
    layer, shape, sizes, dtype, split_as, train_step, assert_close
):
    whole = layer().to(dtype)
    for parameter in whole.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    replicas = split_as(convert_model(copy.deepcopy(whole)), sizes)
    x = torch.randn(sum(sizes), *shape, dtype=dtype) * 2 + 3
    tolerance = EXACT if dtype is torch.float64 else {}
    for _ in range(2):  # the second step sees running statistics that the first has moved
        assert_close(train_step(replicas, x), train_step(whole, x), **tolerance)


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_a_residual_net_on_replicas_equals_the_whole_batch(
    sizes, residual_net, split_as, train_step, assert_close
):
    replicas = split_as(convert_model(residual_net()), sizes)
    x = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64)
    assert_close(train_step(replicas, x), train_step(residual_net(), x), **EXACT)


@pytest.mark.parametrize("fused", [True, False])
def test_twenty_steps_of_sgd_end_at_the_weights_of_the_whole_batch(fused, residual_net, split_as):
    whole, converted = residual_net(), convert_model(residual_net(), fused=fused)
    replicas = split_as(converted, [2, 3, 1, 2])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (whole, converted)]
    for _ in range(20):
        x, labels = torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.randint(5, (8,))
        for model, optimizer in zip((whole, replicas), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    torch.testing.assert_close(converted.state_dict(), whole.state_dict(), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:expected batch-norm layers that synchronize:UserWarning")
def test_without_conversion_replicas_differ_from_the_whole_batch(residual_net, split_as, train_step):
    """So the tests above can fail."""
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    y = train_step(split_as(residual_net(), [2, 2, 2, 2]), x)["y"]
    assert (y - train_step(residual_net(), x)["y"]).abs().max() > 0.01
