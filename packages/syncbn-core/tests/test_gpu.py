"""The same on CUDA: replicas that share device 0 are one batch, and the host never waits for the device."""

import os

import pytest
import torch

from gpus import launches, no_wait, recorded
from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}
LAYOUTS = [
    (SynchronizedBatchNorm1d, (), torch.contiguous_format),
    (SynchronizedBatchNorm1d, (5,), torch.contiguous_format),
    (SynchronizedBatchNorm2d, (3, 5), torch.contiguous_format),
    (SynchronizedBatchNorm2d, (3, 5), torch.channels_last),
    (SynchronizedBatchNorm3d, (2, 3, 2), torch.contiguous_format),
    (SynchronizedBatchNorm3d, (2, 3, 2), torch.channels_last_3d),
    (SynchronizedBatchNorm, (3, 5), torch.contiguous_format),
]


def chunks_of(split, spatial, memory_format=torch.contiguous_format, dtype=torch.float32):
    return [
        (torch.randn(size, 4, *spatial, device="cuda", dtype=dtype) * 3 + 1).contiguous(
            memory_format=memory_format
        )
        for size in split
    ]


@pytest.fixture
def layer_of(randomize):
    return lambda kind=SynchronizedBatchNorm2d, **options: randomize(kind(4, device="cuda", **options))


@FUSED
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("kind", "spatial", "memory_format"), LAYOUTS)
@pytest.mark.parametrize("split", [[3], [2, 2], [1, 3], [0, 4], [1, 1], [3, 0, 1, 2]], ids=str)
def test_any_split_of_any_shape_equals_the_whole_batch(
    split, kind, spatial, memory_format, dtype, fused, layer_of, assert_equals_whole_batch
):
    chunks = chunks_of(split, spatial, memory_format, dtype)
    assert_equals_whole_batch(layer_of(kind, fused=fused, dtype=dtype), chunks, **TOLERANCES[dtype])


@FUSED
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "untracked"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_every_option_equals_the_whole_batch_step_after_step(
    affine, track_running_stats, momentum, fused, layer_of, assert_equals_whole_batch
):
    options = {"affine": affine, "track_running_stats": track_running_stats, "momentum": momentum}
    layer = layer_of(fused=fused, dtype=torch.float64, **options)
    for _ in range(3):
        chunks = chunks_of([2, 1], (3, 2), dtype=torch.float64)
        assert_equals_whole_batch(layer, chunks, **TOLERANCES[torch.float64])


@FUSED
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_are_kept(memory_format, fused, layer_of, run_replicas):
    chunks = [chunk.requires_grad_() for chunk in chunks_of([2, 3], (3, 5), memory_format)]
    outputs = run_replicas(layer_of(fused=fused), chunks)
    sum((y**3).sum() for y in outputs).backward()
    for tensor in outputs + [chunk.grad for chunk in chunks]:
        assert tensor.is_contiguous(memory_format=memory_format)


@FUSED
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_give_half_outputs_by_statistics_of_float32(
    dtype, memory_format, fused, layer_of, assert_equals_whole_batch
):
    layer = layer_of(momentum=1.0, fused=fused)
    chunks = chunks_of([2, 3], (16, 15), memory_format, dtype)
    roundings = 8 * torch.finfo(dtype).eps  # for numbers of order 1, and sums of them
    ours = assert_equals_whole_batch(layer, chunks, rtol=roundings, atol=20 * roundings)
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    batch = torch.cat(chunks).double()
    torch.testing.assert_close(layer.running_mean.double(), batch.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), batch.var((0, 2, 3)), rtol=1e-5, atol=0)


@FUSED
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.01), (1e4, 1.0), (1e6, 1.0)])
def test_a_mean_far_from_zero_costs_the_variance_no_digits(
    mean, std, memory_format, fused, layer_of, run_replicas
):
    layer = layer_of(momentum=1.0, fused=fused)
    batch = torch.randn(16, 4, 28, 28, device="cuda", dtype=torch.float64) * std + mean
    batch = batch.float().contiguous(memory_format=memory_format)
    run_replicas(layer, batch.split([5, 11]))
    expected = batch.double().var((0, 2, 3))
    # torch's kernel adds up around a mean that is rounded to float32.
    rounding = 2 * abs(mean) * 2.0**-24 / std if fused else 0.0
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-4 + rounding, atol=0)


@FUSED
@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_step_makes_the_host_wait_for_the_device(dtype, momentum, eps_mode, fused, layer_of, replicas_of):
    layer = layer_of(momentum=momentum, eps_mode=eps_mode, fused=fused)
    inputs = [chunk.requires_grad_() for chunk in chunks_of([2, 3], (8, 8), dtype=dtype)]
    gradients = [torch.randn_like(x) for x in inputs]

    def step():
        outputs = replicas_of(layer, 2).run(lambda replica, rank: replica(inputs[rank]))
        torch.autograd.backward(outputs, gradients)

    step()  # one-time setup, such as a cuBLAS handle, may wait
    with no_wait():
        step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("replicas", [2, 4])
def test_a_step_of_replicas_takes_few_launches(replicas, dtype, layer_of, replicas_of):
    layer = layer_of(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = [chunk.requires_grad_() for chunk in chunks_of([2] * replicas, (3, 5), dtype=dtype)]
    gradients = [torch.randn_like(x) for x in inputs]
    for _ in range(2):  # in the second, everything that is kept exists already
        for leaf in (*inputs, *layer.parameters()):
            leaf.grad = None
        call = replicas_of(layer, replicas)
        outputs, forward = launches(lambda: call.run(lambda replica, rank: replica(inputs[rank])))  # noqa: B023
        _, backward = launches(lambda: torch.autograd.backward(outputs, gradients))  # noqa: B023
    assert len(forward) <= 5 * replicas + 4, forward
    assert len(backward) <= 5 * replicas + 3, backward


@pytest.mark.skipif("TORCH_CUDA_SANITIZER" in os.environ, reason="takes a capture for an execution")
@FUSED
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_cuda_graph_of_a_step_gives_the_same_as_a_step(memory_format, fused, layer_of, stock_twin):
    layer = layer_of(fused=fused, dtype=torch.float64)
    twin = stock_twin(layer, 4)
    (x, dy) = chunks_of([5, 5], (3, 5), memory_format, torch.float64)
    x.requires_grad_()

    def step():
        y = layer(x)
        y.backward(dy)
        return y

    graph, y = recorded(step, [x, *layer.parameters()])
    layer.load_state_dict(twin.state_dict())
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * 2 + 1)
            dy.copy_(torch.randn_like(dy))
        graph.replay()
        whole = x.detach().clone().requires_grad_()
        twin.zero_grad()
        expected = twin(whole)
        expected.backward(dy)
        ours = [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
        theirs = [expected, whole.grad, *(p.grad for p in twin.parameters()), *twin.buffers()]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@FUSED
def test_a_stream_of_the_user_is_used(fused, layer_of, stock_twin, replicas_of):
    layer = layer_of(fused=fused)
    twin = stock_twin(layer, 4)
    stream = torch.cuda.Stream()
    batch = torch.randn(64, 4, 64, 64, device="cuda")
    torch.cuda.synchronize()

    def forward(replica, rank):
        with torch.cuda.stream(stream):
            # Enough work that a read of x on another stream would come too early.
            x = batch[rank::2]
            for _ in range(200):
                x = x * 1.0001
            return replica(x)

    outputs = replicas_of(layer, 2).run(forward)
    torch.cuda.synchronize()
    x = batch
    for _ in range(200):
        x = x * 1.0001
    expected = twin(torch.cat([x[0::2], x[1::2]]))
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-4, atol=1e-4)


@FUSED
def test_repeated_steps_give_the_same_bits(fused, layer_of, train_step, run_replicas):
    chunks = chunks_of([5, 3], (9, 9))
    layer = layer_of(fused=fused)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    steps = []
    for _ in range(5):
        layer.load_state_dict(state)
        steps.append(train_step(layer, chunks, run_replicas))
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=0, atol=0)
