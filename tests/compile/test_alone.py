"""Without processes and replicas, a compiled layer is one graph, and equals the eager one."""

import copy

import pytest
import torch

from syncbn_core import (
    THIS_PROCESS,
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    set_sbn_eps_mode,
)

OPTIONS = {
    "plain": {},
    "clamp": {"eps_mode": "clamp", "eps": 0.5},
    "clamp if synchronized": {"eps_mode": "clamp_synchronized", "eps": 0.5},
    "cumulative": {"momentum": None},
    "cumulative and clamp": {"momentum": None, "eps_mode": "clamp", "eps": 0.5},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "no statistics and clamp": {"track_running_stats": False, "eps_mode": "clamp", "eps": 0.5},
    "composite": {"fused": False},
    "this process": {"process_group": THIS_PROCESS},
}


def step(called, layer, x):
    x = x.clone().requires_grad_()
    y = called(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_is_one_graph_and_equals_eager(options, training):
    layer = SynchronizedBatchNorm2d(3, **options).double().train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0]).view(-1, 1, 1)
    for _ in range(2):
        layer.zero_grad()
        twin.zero_grad()
        torch.testing.assert_close(step(compiled, layer, x), step(twin, twin, x))
    assert torch._dynamo.explain(layer)(x).graph_break_count == 0


@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (SynchronizedBatchNorm1d, (5, 3)),
        (SynchronizedBatchNorm1d, (5, 3, 4)),
        (SynchronizedBatchNorm3d, (5, 3, 2, 1, 2)),
        (SynchronizedBatchNorm, (5, 3, 2, 2)),
    ],
    ids=["1d", "1d of sequences", "3d", "any"],
)
def test_every_kind_is_one_graph_and_equals_eager(kind, shape, eps_mode):
    layer = kind(3, eps=0.5, eps_mode=eps_mode).double()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(step(compiled, layer, x), step(twin, twin, x))


def test_the_default_of_the_eps_mode_is_looked_at_in_each_call():
    layer = SynchronizedBatchNorm2d(3, eps=0.5).double()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), twin(x))
    set_sbn_eps_mode("clamp")
    try:
        torch.testing.assert_close(compiled(x), twin(x))
    finally:
        set_sbn_eps_mode("plus")
    torch.testing.assert_close(compiled(x), twin(x))


def test_tracking_is_looked_at_in_each_call():
    layer = SynchronizedBatchNorm2d(3)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for tracks in (True, False, True):
        layer.track_running_stats = tracks
        before = layer.running_mean.clone()
        compiled(torch.randn(5, 3, 2, 2))
        assert torch.equal(layer.running_mean, before) == (not tracks)
    assert layer.num_batches_tracked == twin.num_batches_tracked + 2


@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
def test_a_batch_without_values_does_what_it_does_eagerly(eps_mode):
    layer = SynchronizedBatchNorm2d(3, eps_mode=eps_mode)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert compiled(torch.empty(0, 3, 2, 2)).shape == eager(torch.empty(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


@pytest.mark.filterwarnings("default")  # of the compiler itself
@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
def test_one_value_is_an_error(eps_mode):
    layer = SynchronizedBatchNorm1d(3, eps_mode=eps_mode)
    # The compiler makes a RuntimeError of what torch's own function raises.
    with pytest.raises(
        (ValueError, RuntimeError), match="Expected more than 1 value per channel when training"
    ):
        torch.compile(layer, backend="aot_eager")(torch.randn(1, 3))


def test_dynamic_shapes_are_one_graph():
    layer = SynchronizedBatchNorm2d(3, eps_mode="clamp", eps=0.5).double()
    twin = copy.deepcopy(layer)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)
    for size in (5, 3, 8):
        x = torch.randn(size, 3, size, 2, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), twin(x))
    assert len(graphs) == 1
