"""``eps_mode="clamp_synchronized"`` clamps only where a layer synchronizes, as vendored folders do."""

import pytest
import torch
from torch.nn import functional as F

from syncbn_core import SynchronizedBatchNorm2d, set_sbn_eps_mode

pytestmark = pytest.mark.usefixtures("graph_kind")

EPS = 0.5
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])


@pytest.fixture(params=["of the layer", "by default"])
def layer_of_old(request, randomize):
    """Build a layer whose mode is "clamp_synchronized", by an argument or by the default."""
    if request.param == "by default":
        set_sbn_eps_mode("clamp_synchronized")

    def build(**options):
        mode = {"eps_mode": "clamp_synchronized"} if request.param == "of the layer" else {}
        return randomize(SynchronizedBatchNorm2d(4, EPS, dtype=torch.float64, **mode, **options))

    yield build
    set_sbn_eps_mode("plus")


def batch_of(size):
    std = torch.tensor([0.1, 0.3, 1.0, 3.0], dtype=torch.float64).view(
        4, 1, 1
    )  # variances below and above EPS
    return torch.randn(size, 4, 3, 2, dtype=torch.float64) * std


def by_torch(layer, x, training):
    running = [layer.running_mean.clone(), layer.running_var.clone()]
    return F.batch_norm(x, *running, layer.weight, layer.bias, training, 0.1, EPS)


@FUSED
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_alone_it_adds_eps(training, fused, layer_of_old):
    layer, x = layer_of_old(fused=fused).train(training), batch_of(4)
    expected = by_torch(layer, x, training)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@FUSED
def test_replicas_in_evaluation_add_eps(fused, layer_of_old, run_replicas):
    layer, x = layer_of_old(fused=fused).eval(), batch_of(4)
    layer.running_var.copy_(torch.tensor([0.1, 0.4, 0.6, 2.0]))
    y = torch.cat(run_replicas(layer, x.split([1, 3])))
    torch.testing.assert_close(y, by_torch(layer, x, False), rtol=1e-12, atol=1e-12)


@FUSED
def test_replicas_in_training_clamp(fused, layer_of_old, run_replicas, train_step, randomize):
    layer, x = layer_of_old(fused=fused), batch_of(5)
    clamp = SynchronizedBatchNorm2d(4, EPS, dtype=torch.float64, eps_mode="clamp", fused=fused)
    clamp.load_state_dict(layer.state_dict())
    chunks = x.split([2, 3])
    ours = train_step(layer, chunks, run_replicas)
    torch.testing.assert_close(ours, train_step(clamp, chunks, run_replicas), rtol=0, atol=0)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    weight, bias = (p.detach().view(1, 4, 1, 1) for p in (layer.weight, layer.bias))
    expected = (x - mean) / var.clamp(min=EPS).sqrt() * weight + bias
    torch.testing.assert_close(ours["y"], expected, rtol=1e-12, atol=1e-12)


def test_in_replicas_of_a_layer_with_one_replica_it_adds_eps(layer_of_old, run_replicas):
    layer, x = layer_of_old(), batch_of(4)
    expected = by_torch(layer, x, True)
    torch.testing.assert_close(*run_replicas(layer, [x]), expected, rtol=0, atol=0)
