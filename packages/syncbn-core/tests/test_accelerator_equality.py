"""On a simulated accelerator, any split over any devices equals the whole batch, and the host never waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulated_accelerator.replicas import DeviceReplicas, Step, twin_of, weights_of, whole_batch_step
from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

pytestmark = pytest.mark.usefixtures("accelerator")

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
# For numbers of order 1 and sums of some hundreds of them.
TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 0.01, "atol": 0.02},
    torch.bfloat16: {"rtol": 0.06, "atol": 0.15},
}
DEVICES = {
    "one device": ["sim:0"] * 4,
    "two devices": ["sim:0", "sim:1", "sim:1", "sim:0"],
    "three devices": ["sim:2", "sim:0", "sim:3", "sim:2"],
    "four devices": ["sim:0", "sim:1", "sim:2", "sim:3"],
}
LAYOUTS = [
    (SynchronizedBatchNorm1d, (), torch.contiguous_format),
    (SynchronizedBatchNorm1d, (5,), torch.contiguous_format),
    (SynchronizedBatchNorm2d, (3, 5), torch.contiguous_format),
    (SynchronizedBatchNorm2d, (3, 5), torch.channels_last),
    (SynchronizedBatchNorm3d, (2, 3, 2), torch.contiguous_format),
    (SynchronizedBatchNorm3d, (2, 3, 2), torch.channels_last_3d),
    (SynchronizedBatchNorm, (3, 5), torch.contiguous_format),
]
SPLITS = [[3], [2, 2], [1, 3], [0, 4], [1, 1], [0, 0, 1, 4], [3, 0, 1, 2]]


def batches(
    sizes: Sequence[int],
    spatial: Sequence[int] = (3, 5),
    layout: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    return [
        (torch.randn(size, 4, *spatial, dtype=dtype) * 3 + 1).contiguous(memory_format=layout)
        for size in sizes
    ]


def check(layer: nn.Module, chunks: Sequence[Tensor], devices: Sequence[str], **options: Any) -> Step:
    """Train one step on replicas; torch's own layer makes the same of the whole batch, in float64."""
    twin = twin_of(layer, chunks[0].dim())
    step = Step(layer, chunks, devices[: len(chunks)], **options)
    expected = whole_batch_step(twin, chunks)
    tolerance = TOLERANCES[chunks[0].dtype]
    torch.testing.assert_close(step.gave, expected, check_dtype=False, **tolerance)
    assert [(counts.reads, counts.waits) for counts in step.counts] == [(0, 0)] * 2, step.counts
    return step


@pytest.fixture
def layer_on(layer_of: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Build a layer on a device, of float32 at least."""
    return lambda kind=SynchronizedBatchNorm2d, device="sim:0", **options: layer_of(
        kind, device=device, **options
    )


@FUSED
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("devices", DEVICES)
def test_any_split_over_any_devices_equals_the_whole_batch(devices, split, fused, layer_on) -> None:
    check(layer_on(device=DEVICES[devices][0], fused=fused), batches(split), DEVICES[devices])


@FUSED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "spatial", "layout"), LAYOUTS)
def test_any_kind_of_input_equals_the_whole_batch(kind, spatial, layout, dtype, fused, layer_on) -> None:
    chunks = batches([2, 0, 3], spatial, layout, dtype)
    step = check(layer_on(kind, dtype=dtype, fused=fused), chunks, DEVICES["four devices"])
    for x, y in zip(step.inputs, step.outputs):
        for tensor in (y, x.grad):
            assert tensor.device == x.device
            assert tensor.is_contiguous(memory_format=layout)


@FUSED
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [[2, 3], [0, 2, 1]], ids=str)
def test_half_inputs_of_a_float32_layer_equal_the_whole_batch(split, dtype, layout, fused, layer_on) -> None:
    layer = layer_on(dtype=torch.float32, momentum=1.0, fused=fused)
    chunks = batches(split, layout=layout, dtype=dtype)
    step = check(layer, chunks, DEVICES["four devices"])
    assert step.gave["y"].dtype == step.gave["dx"].dtype == dtype
    whole = torch.cat(chunks).double()
    torch.testing.assert_close(layer.running_mean.cpu().double(), whole.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.cpu().double(), whole.var((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_of_halves_equals_the_whole_batch(dtype, layer_on) -> None:
    check(layer_on(dtype=dtype), batches([2, 3], dtype=dtype), DEVICES["two devices"])


@FUSED
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "untracked"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_every_option_equals_the_whole_batch_step_after_step(
    affine, track_running_stats, momentum, fused, layer_on
) -> None:
    options = {"affine": affine, "track_running_stats": track_running_stats, "momentum": momentum}
    layer = layer_on(fused=fused, **options)
    for split in ([2, 1], [0, 3], [1, 1]):
        check(layer, batches(split), DEVICES["four devices"])


@FUSED
@pytest.mark.parametrize("eps", [1e-5, 5.0, 100.0])
def test_a_clamped_variance_equals_that_of_plain_operations(eps, fused, layer_on) -> None:
    layer = layer_on(eps=eps, eps_mode="clamp", fused=fused)
    twin = twin_of(layer, 4)

    def clamped(twin: nn.Module, x: Tensor) -> Tensor:
        twin(x)  # updates the running statistics
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (p.view(1, -1, 1, 1) for p in (twin.weight, twin.bias))
        return (x - mean) / var.clamp(min=eps).sqrt() * weight + bias

    chunks = batches([2, 0, 3])
    for chunk in chunks:
        chunk[:, 1] = 2.0  # a variance of zero
    step = Step(layer, chunks, DEVICES["four devices"][:3])
    torch.testing.assert_close(step.gave, whole_batch_step(twin, chunks, clamped), rtol=1e-10, atol=1e-10)
    assert [(counts.reads, counts.waits) for counts in step.counts] == [(0, 0)] * 2, step.counts


@FUSED
def test_a_channel_without_variance_equals_the_whole_batch(fused, layer_on) -> None:
    chunks = batches([2, 0, 3])
    for chunk in chunks:
        chunk[:, 1] = 2.0
    check(layer_on(fused=fused), chunks, DEVICES["four devices"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.01), (1e4, 1.0)])
def test_a_mean_far_from_zero_costs_the_variance_no_digits(mean, std, layout, layer_on) -> None:
    layer = layer_on(momentum=1.0, dtype=torch.float32)
    batch = (torch.randn(8, 4, 14, 14, dtype=torch.float64) * std + mean).float()
    chunks = batch.contiguous(memory_format=layout).split([3, 5])
    Step(layer, chunks, DEVICES["four devices"][:2])
    expected = batch.double().var((0, 2, 3))
    # torch's kernel rounds each mean to float32, by up to 3e-8 of it.
    rounded = (mean * 2.0**-24 / std) ** 2
    torch.testing.assert_close(layer.running_var.cpu().double(), expected, rtol=1e-4 + 4 * rounded, atol=0)


@FUSED
def test_a_stock_replication_loop_equals_the_whole_batch(fused, layer_on) -> None:
    layer = layer_on(fused=fused)
    check(layer, batches([2, 1, 3]), DEVICES["four devices"], introduced=False)


@FUSED
@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
def test_parameters_that_need_no_gradient_get_none(frozen, fused, layer_on) -> None:
    layer = layer_on(fused=fused)
    twin = twin_of(layer, 4)
    for name in frozen:
        for module in (layer, twin):
            getattr(module, name).requires_grad_(False)
    chunks = batches([2, 1])
    step = Step(layer, chunks, DEVICES["two devices"][:2])
    torch.testing.assert_close(step.gave, whole_batch_step(twin, chunks), rtol=1e-10, atol=1e-10)


@FUSED
def test_a_layer_in_evaluation_equals_torchs_and_does_not_wait(fused, layer_on) -> None:
    check(layer_on(fused=fused).eval(), batches([2, 1, 3]), DEVICES["four devices"])


@FUSED
def test_without_gradients_the_output_is_the_same(fused, layer_on) -> None:
    layer = layer_on(fused=fused)
    twin = twin_of(layer, 4)
    chunks = batches([2, 0, 3])
    with torch.no_grad():
        replicas = DeviceReplicas(layer, DEVICES["four devices"][:3])
        inputs = [chunk.to(f"sim:{rank}") for rank, chunk in enumerate(chunks)]
        outputs = replicas.run(lambda replica, rank: replica(inputs[rank]))
    expected = twin(torch.cat(chunks))
    torch.testing.assert_close(torch.cat([y.cpu() for y in outputs]), expected, rtol=1e-10, atol=1e-10)
    assert not any(y.requires_grad for y in outputs)


@FUSED
@pytest.mark.parametrize("used", [[0, 2], [1], [2]], ids=str)
def test_outputs_that_the_loss_ignores_contribute_nothing(used, fused, layer_on) -> None:
    layer = layer_on(fused=fused)
    twin = twin_of(layer, 4)
    chunks = batches([2, 1, 3])
    inputs = [chunk.to(f"sim:{rank}").requires_grad_() for rank, chunk in enumerate(chunks)]
    outputs = DeviceReplicas(layer, DEVICES["four devices"][:3]).run(
        lambda replica, rank: replica(inputs[rank])
    )
    weights = weights_of(outputs)
    torch.autograd.backward(
        [outputs[rank] for rank in used], [weights[rank].to(f"sim:{rank}") for rank in used]
    )
    whole = torch.cat(chunks).requires_grad_()
    parts = twin(whole).split([len(chunk) for chunk in chunks])
    torch.autograd.backward([parts[rank] for rank in used], [weights[rank] for rank in used])
    dx = torch.cat([x.grad.cpu() for x in inputs])
    torch.testing.assert_close(dx, whole.grad, rtol=1e-10, atol=1e-10)
    for ours, expected in zip(layer.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad.cpu(), expected.grad, rtol=1e-10, atol=1e-10)
