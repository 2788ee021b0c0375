"""Layers of forks that override parts of a vendored `sync_batchnorm` layer, and the old numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn_core import SynchronizedBatchNorm2d, set_sbn_eps_mode
from syncbn_parallel import DataParallelWithCallback

C = 3


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(7, C, 4, 4, dtype=torch.float64) * 5 + 2


class RunningMeanOfAllBatches(SynchronizedBatchNorm2d):
    """Keeps decaying sums, divides by their weight, and assigns the quotient, as segmentation forks do."""

    def __init__(self, num_features, momentum=0.001):
        super().__init__(num_features, momentum=momentum)
        self.register_buffer("mean_sum", self.running_mean.clone())
        self.register_buffer("var_sum", self.running_var.clone())
        self.register_buffer("weight_sum", torch.ones(1))
        self.batches = 0

    def _compute_mean_std(self, mean, m2, count):
        keep = 1 - self.momentum
        self.mean_sum = self.mean_sum * keep + mean.detach()
        self.var_sum = self.var_sum * keep + m2.detach() / (count - 1)
        self.weight_sum = self.weight_sum * keep + 1
        self.running_mean = self.mean_sum / self.weight_sum
        self.running_var = self.var_sum / self.weight_sum
        self.batches += 1
        return mean, (m2 / count + self.eps) ** -0.5


def test_what_compute_mean_std_assigns_reaches_the_layer_of_the_model(x):
    layer = RunningMeanOfAllBatches(C).double()
    model = DataParallelWithCallback(layer, ["cpu"] * 3)
    mean, var, weight = torch.zeros(C).double(), torch.ones(C).double(), 1.0
    for step in range(1, 4):
        batch = x * step
        model(batch)
        mean = mean * 0.999 + batch.mean((0, 2, 3))
        var = var * 0.999 + batch.transpose(0, 1).reshape(C, -1).var(1)
        weight = weight * 0.999 + 1
        assert layer.batches == step
        assert layer.weight_sum.item() == pytest.approx(weight, rel=1e-12)
        torch.testing.assert_close(layer.running_mean, mean / weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, var / weight, rtol=1e-12, atol=1e-12)


class BiasedRunningVariance(SynchronizedBatchNorm2d):
    """The running variance of detectron2's layer; the code stands in docs/migrating.md."""

    def _compute_mean_std(self, mean, m2, count):
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(m2.detach() / count, self.momentum)
        self.num_batches_tracked.add_(1)
        return mean, (m2 / count + self.eps).rsqrt()


def test_a_biased_running_variance_can_be_kept(x):
    layer = BiasedRunningVariance(C).double()
    DataParallelWithCallback(layer, ["cpu"] * 3)(x)
    biased = x.transpose(0, 1).reshape(C, -1).var(1, unbiased=False)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * biased, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 1


def test_an_overridden_forward_that_calls_super_synchronizes(x):
    class Scaled(SynchronizedBatchNorm2d):
        def forward(self, x):
            return super().forward(2 * x) + 1

    y = DataParallelWithCallback(Scaled(C).double(), ["cpu"] * 3)(x)
    torch.testing.assert_close(y, nn.BatchNorm2d(C).double()(2 * x) + 1, rtol=1e-12, atol=1e-12)


def test_a_class_conditional_layer_synchronizes(x):
    class Conditional(SynchronizedBatchNorm2d):
        def __init__(self, num_features):
            super().__init__(num_features, affine=False)

        def forward(self, x, gain, bias):
            return super().forward(x) * gain[..., None, None] + bias[..., None, None]

    gain, bias = torch.randn(2, 7, C, dtype=torch.float64, requires_grad=True)
    y = DataParallelWithCallback(Conditional(C).double(), ["cpu"] * 3)(x, gain, bias)
    whole = nn.BatchNorm2d(C, affine=False).double()(x) * gain[..., None, None] + bias[..., None, None]
    torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
    ours = torch.autograd.grad((y * weights).sum(), (gain, bias))
    theirs = torch.autograd.grad((whole * weights).sum(), (gain, bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_gradient_penalty_works_without_the_fused_kernels(x):
    def penalty(layer, wrap):
        images = x.clone().requires_grad_()
        score = wrap(layer)(images).tanh().square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(score.sum(), images, create_graph=True)
        gradient.square().sum().backward()
        return layer.weight.grad

    ours = penalty(
        SynchronizedBatchNorm2d(C, fused=False).double(),
        lambda layer: DataParallelWithCallback(layer, ["cpu"] * 3),
    )
    theirs = penalty(nn.BatchNorm2d(C).double(), lambda layer: layer)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.fixture
def clamp_synchronized():
    set_sbn_eps_mode("clamp_synchronized")
    yield
    set_sbn_eps_mode("plus")


@pytest.mark.usefixtures("clamp_synchronized")
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3])  # variances above, around and below eps
def test_the_eps_mode_for_old_checkpoints_gives_the_old_numbers(scale):
    """A vendored layer clamps over several replicas in training, and is torch's own elsewhere."""
    torch.manual_seed(0)
    eps = 1e-5
    x = torch.randn(7, C, 4, 4, dtype=torch.float64) * scale
    layer = SynchronizedBatchNorm2d(C, eps=eps).double()
    model = DataParallelWithCallback(layer, ["cpu"] * 3)
    mean = x.mean((0, 2, 3), keepdim=True)
    var = x.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(model(x), (x - mean) / var.clamp(min=eps).sqrt(), rtol=1e-9, atol=1e-12)

    layer.running_var.copy_(var.flatten())
    running = layer.running_mean.clone(), layer.running_var.clone()
    for run in (model, layer):
        y = run.eval()(x)
        torch.testing.assert_close(y, F.batch_norm(x, *running, eps=eps), rtol=1e-9, atol=1e-12)
    alone = layer.train()(x)
    torch.testing.assert_close(
        alone, F.batch_norm(x, None, None, training=True, eps=eps), rtol=1e-9, atol=1e-12
    )
