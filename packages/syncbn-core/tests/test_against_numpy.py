"""Forward and backward against the formulas in NumPy's float64, in both eps modes."""

import numpy as np
import pytest
import torch

from syncbn_core import BatchNorm2dReimpl, SynchronizedBatchNorm2d, set_sbn_eps_mode

pytestmark = pytest.mark.usefixtures("graph_kind")

EPS = 0.5  # between the variances of the channels
CHANNEL_STD = torch.tensor([0.1, 0.3, 1.0, 3.0], dtype=torch.float64).view(4, 1, 1)


def by_the_formulas(x, dy, weight, bias, eps_mode):
    """Batch norm over ``(N, C)`` with its gradients, from the definition."""
    mean, var = x.mean(0), x.var(0)
    under_floor = (var < EPS) & (eps_mode == "clamp")
    invstd = 1 / np.sqrt(np.maximum(var, EPS) if eps_mode == "clamp" else var + EPS)
    x_hat = (x - mean) * invstd
    dx_hat = dy * weight
    # If the variance is below the floor, it is a constant: the term of the variance is 0.
    by_way_of_var = np.where(under_floor, 0, x_hat * (x_hat * dx_hat).mean(0))
    return {
        "y": x_hat * weight + bias,
        "dx": invstd * (dx_hat - dx_hat.mean(0) - by_way_of_var),
        "dweight": (dy * x_hat).sum(0),
        "dbias": dy.sum(0),
        "running_mean": mean,
        "running_var": x.var(0, ddof=1),
        "num_batches_tracked": np.array(1),
    }


def rows(tensor):
    """``(N, C, H, W)`` as ``(N * H * W, C)``."""
    return tensor.detach().movedim(1, -1).flatten(0, -2).numpy()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
@pytest.mark.parametrize("split", [[5], [2, 3], [1, 0, 4]], ids=str)
def test_everything_is_what_the_formulas_say(
    split, eps_mode, fused, randomize, train_step, run_replicas, weighted_sum
):
    layer = randomize(
        SynchronizedBatchNorm2d(4, EPS, momentum=1.0, eps_mode=eps_mode, fused=fused, dtype=torch.float64)
    )
    chunks = [torch.randn(size, 4, 3, 2, dtype=torch.float64) * CHANNEL_STD for size in split]
    ours = train_step(layer, chunks, run_replicas)

    y = ours["y"].requires_grad_()
    (dy,) = torch.autograd.grad(weighted_sum(y), y)
    expected = by_the_formulas(
        rows(torch.cat(chunks)), rows(dy), *(p.detach().numpy() for p in layer.parameters()), eps_mode
    )
    actual = {key: rows(value) if value.dim() == 4 else value for key, value in ours.items()}
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-11, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_clamp_follows_the_default_at_the_time_of_the_call(training, run_replicas):
    unset = SynchronizedBatchNorm2d(4, EPS).train(training)
    clamp = SynchronizedBatchNorm2d(4, EPS, eps_mode="clamp").train(training)
    plus = SynchronizedBatchNorm2d(4, EPS, eps_mode="plus").train(training)
    chunks = [torch.randn(2, 4, 3, 2) for _ in range(2)]
    expected_clamp, expected_plus = run_replicas(clamp, chunks), run_replicas(plus, chunks)
    try:
        set_sbn_eps_mode("clamp")
        torch.testing.assert_close(run_replicas(unset, chunks), expected_clamp, rtol=0, atol=0)
        torch.testing.assert_close(run_replicas(plus, chunks), expected_plus, rtol=0, atol=0)
    finally:
        set_sbn_eps_mode("plus")
    torch.testing.assert_close(run_replicas(unset, chunks), expected_plus, rtol=0, atol=0)


@pytest.mark.parametrize("running_var", [0.1, 2.0], ids=["below eps", "above eps"])
def test_clamp_evaluates_with_a_floor_under_the_running_variance(running_var):
    layer = SynchronizedBatchNorm2d(4, EPS, eps_mode="clamp", dtype=torch.float64).eval()
    layer.running_var.fill_(running_var)
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    np.testing.assert_allclose(layer(x).detach(), x / np.sqrt(max(running_var, EPS)), rtol=1e-12)


def test_the_reference_layer_is_what_the_formulas_say(randomize, train_step):
    reference = randomize(BatchNorm2dReimpl(4, EPS, momentum=0.3).double())
    twin = torch.nn.BatchNorm2d(4, EPS, momentum=0.3).double()
    twin.load_state_dict({**reference.state_dict(), "num_batches_tracked": torch.tensor(0)})
    chunks = [torch.randn(3, 4, 3, 2, dtype=torch.float64)]

    def on_one_device(model, inputs):
        return [model(x) for x in inputs]

    ours = train_step(reference, chunks, on_one_device)
    theirs = train_step(twin, chunks, on_one_device)
    del theirs["num_batches_tracked"]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.eval()(*chunks), twin.eval()(*chunks), rtol=1e-12, atol=1e-12)


def test_the_reference_layer_resets_to_a_new_one(randomize):
    reference = randomize(BatchNorm2dReimpl(4))
    reference.reset_parameters()
    torch.testing.assert_close(reference.state_dict(), BatchNorm2dReimpl(4).state_dict(), rtol=0, atol=0)
