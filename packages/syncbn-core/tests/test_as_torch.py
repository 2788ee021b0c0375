"""Replicas accept the inputs that torch's own layer accepts for the whole batch, and refuse the others."""

import copy

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("graph_kind")

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@FUSED
@pytest.mark.parametrize("momentum", [0.3, None])
def test_track_running_stats_switched_off_on_a_built_layer_stops_the_running_statistics(
    momentum, fused, layer_of, chunks_of, train_step, run_replicas, stock_twin
):
    layer = layer_of(fused=fused, momentum=momentum)
    before = copy.deepcopy(dict(layer.named_buffers()))
    twin = stock_twin(layer, 4)
    layer.track_running_stats = twin.track_running_stats = False
    chunks = chunks_of(2, 1, 3)
    ours = train_step(layer, chunks, run_replicas)
    theirs = train_step(twin, chunks, lambda twin, inputs: [twin(torch.cat(list(inputs)))])
    torch.testing.assert_close(ours, theirs, **TIGHT)
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
    x = torch.cat(chunks)
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x), **TIGHT)


@FUSED
def test_a_cumulative_average_without_a_counter_leaves_the_running_statistics(
    fused, layer_of, chunks_of, run_replicas, stock_twin
):
    layer = layer_of(fused=fused, momentum=None)
    twin = stock_twin(layer, 4)
    layer.num_batches_tracked = twin.num_batches_tracked = None  # as in checkpoints of torch before 0.4.1
    chunks = chunks_of(2, 1, 3)
    torch.testing.assert_close(torch.cat(run_replicas(layer, chunks)), twin(torch.cat(chunks)), **TIGHT)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()), **TIGHT)


@pytest.mark.pairwise
@FUSED
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_channels_that_were_pruned_by_hand_leave_a_stale_num_features(options, fused, layer_of, run_replicas):
    layer = layer_of(fused=fused, **options)
    keep = torch.tensor([0, 2])
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter[keep].detach()))
    for name, buffer in list(layer.named_buffers()):
        if buffer.dim():
            setattr(layer, name, buffer[keep])
    twin = nn.BatchNorm2d(2, layer.eps, layer.momentum, layer.affine, layer.track_running_stats).double()
    twin.load_state_dict(layer.state_dict())
    chunks = [torch.randn(size, 2, 3, 5, dtype=torch.float64) for size in (2, 1)]
    torch.testing.assert_close(torch.cat(run_replicas(layer, chunks)), twin(torch.cat(chunks)), **TIGHT)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), **TIGHT)


@pytest.mark.pairwise
@FUSED
@pytest.mark.parametrize("names", ["weight bias", "running_mean running_var"])
@pytest.mark.parametrize(
    ("layers", "inputs"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str
)
def test_an_input_of_another_dtype_than_the_layer_is_an_error(
    layers, inputs, names, fused, layer_of, chunks_of, replicas_of
):
    options = {"track_running_stats": False} if "weight" in names else {"affine": False}
    layer = layer_of(dtype=layers, fused=fused, **options)
    chunks = chunks_of(2, 1, dtype=inputs)
    with pytest.raises(RuntimeError):
        nn.BatchNorm2d(4, **options).to(layers)(chunks[0])
    message = (
        rf"input of the dtype of '{names.split()[0]}' at 'net\.0' \({layers}\), .*, got {inputs}: convert"
    )
    with pytest.raises(RuntimeError, match=message):
        replicas_of(nn.Sequential(layer), 2).run(lambda replica, rank: replica(chunks[rank]))


@FUSED
@pytest.mark.parametrize("eps", [0.0, -1e-5])
def test_an_eps_that_is_not_positive_is_torchs_error_in_training(
    eps, fused, layer_of, chunks_of, replicas_of
):
    layer, chunks = layer_of(eps=eps, fused=fused), chunks_of(2, 1)
    message = "batch_norm eps must be positive.*, but got"
    if torch.__version__ >= (2, 13):  # 2.4 computes with it
        with pytest.raises(ValueError, match=message):
            nn.BatchNorm2d(4, eps=eps).double()(chunks[0])
    with pytest.raises(ValueError, match=rf"{message} {eps} at 'net\.0'"):
        replicas_of(nn.Sequential(layer), 2).run(lambda replica, rank: replica(chunks[rank]))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, SynchronizedBatchNorm1d])
@pytest.mark.parametrize("eps_mode", ["plus", "clamp_synchronized"])
def test_an_empty_batch_alone_is_counted_and_has_a_second_derivative(kind, eps_mode):
    layer = kind(3, **{} if kind is nn.BatchNorm1d else {"eps_mode": eps_mode})
    x = torch.randn(0, 3, 5, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.sum() + dx.sum()).backward()
    assert x.grad.shape == x.shape
    assert layer.num_batches_tracked == 1


# Channels are independent


@pytest.mark.pairwise
@FUSED
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_in_one_channel_leaves_the_others_exact(bad, layout, fused, run_replicas):
    layer = SynchronizedBatchNorm2d(4, momentum=1.0, fused=fused)
    batch = torch.randn(16, 4, 8, 8)
    batch[:, 1] += 1e6
    batch[3, 0, 0, 0] = bad
    chunks = [chunk.contiguous(memory_format=layout) for chunk in batch.split([5, 11])]
    y = torch.cat(run_replicas(layer, chunks))[:, 1:]
    exact = batch.double()[:, 1:]
    var = exact.var((0, 2, 3), correction=0)
    expected = (exact - exact.mean((0, 2, 3), keepdim=True)) / (var + layer.eps).sqrt().view(1, 3, 1, 1)
    # At a mean of 1e6, float32 rounds what is subtracted by 0.03.
    torch.testing.assert_close(y[:, 0].double(), expected[:, 0], rtol=0, atol=0.07)
    torch.testing.assert_close(y[:, 1:].double(), expected[:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var[1:].double(), exact.var((0, 2, 3)), rtol=1e-4, atol=0)
    assert not torch.isfinite(layer.running_var[0])
