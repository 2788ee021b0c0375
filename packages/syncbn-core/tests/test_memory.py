"""A forward keeps x itself or one copy, and vectors, and nothing for longer than its graph exists."""

import gc
import weakref

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm2d
from syncbn_core._autograd import three_nodes

pytestmark = pytest.mark.usefixtures("graph_kind")

C = 3
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Tracked(torch.autograd.Function):
    """The identity, in a node that holds an object to which the test has a weak reference."""

    @staticmethod
    def forward(ctx, x, tracer):
        ctx.tracer = tracer
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class Tracer:
    pass


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("backward", [True, False], ids=["after backward", "without backward"])
def test_a_graph_dies_with_its_outputs_and_needs_no_garbage_collector(
    fused, backward, run_replicas, no_garbage_collection
):
    layer = SynchronizedBatchNorm2d(C, fused=fused)
    tracers = [Tracer(), Tracer()]
    inputs = [Tracked.apply(torch.randn(2, C, 2, 2, requires_grad=True), tracer) for tracer in tracers]
    outputs = run_replicas(layer, inputs)
    if backward:
        sum(y.pow(3).sum() for y in outputs).backward()
    watched = [weakref.ref(thing) for thing in (*tracers, *inputs, *outputs)]
    del tracers, inputs, outputs
    assert [ref() for ref in watched] == [None] * 6


def test_a_graph_keeps_no_layer(replicas_of, no_garbage_collection):
    replicas = replicas_of(SynchronizedBatchNorm2d(C), 2)
    outputs = replicas.run(lambda replica, rank: replica(torch.randn(2, C, 2, 2)))
    watched = [weakref.ref(module) for module in replicas.modules]
    del replicas
    assert [ref() for ref in watched] == [None] * 2
    sum(y.sum() for y in outputs).backward()


def test_a_graph_dies_when_a_second_derivative_was_possible(run_replicas, no_garbage_collection):
    layer = SynchronizedBatchNorm2d(C)
    tracer = Tracer()
    x = torch.randn(2, C, 2, 2, requires_grad=True)
    y = run_replicas(layer, [Tracked.apply(x, tracer), torch.randn(2, C, 2, 2)])[0]
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    watched = weakref.ref(tracer)
    del tracer, y, dx
    assert watched() is None


@LAYOUTS
def test_saved_tensor_hooks_see_x_itself_and_vectors(memory_format, replicas_of):
    layer = SynchronizedBatchNorm2d(C)
    inputs = [
        torch.randn(4, C, 8, 8).contiguous(memory_format=memory_format).requires_grad_() for _ in range(2)
    ]
    kept = [[], []]

    def forward(replica, rank):
        def pack(tensor):
            kept[rank].append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return replica(inputs[rank])

    outputs = replicas_of(layer, 2).run(forward)
    for rank, x in enumerate(inputs):
        big = [tensor for tensor in kept[rank] if tensor.numel() > three_nodes._ROWS * C]
        assert big
        assert all(tensor.data_ptr() == x.data_ptr() for tensor in big)
    del outputs


def storages_of_the_size_of(x):
    """Address and size of all storages of at least this size that any tensor refers to."""
    gc.collect()
    everything = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in everything]
    return {(s.data_ptr(), s.nbytes()) for s in storages if s.nbytes() >= x.untyped_storage().nbytes()}


@pytest.mark.parametrize("graph_kind", ["one node"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@LAYOUTS
def test_the_only_large_tensors_that_one_node_holds_are_the_inputs(
    memory_format, dtype, run_replicas, one_node_calls, joined_calls
):
    inputs = [
        torch.randn(4, C, 8, 8, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        for _ in range(2)
    ]
    before = storages_of_the_size_of(inputs[0])
    outputs = run_replicas(SynchronizedBatchNorm2d(C), inputs)
    assert (one_node_calls, joined_calls) == ([2], [])
    made = {y.untyped_storage().data_ptr() for y in outputs}
    assert len(made) == 2
    assert {address for address, _ in storages_of_the_size_of(inputs[0]) - before} == made
    saved = [tensor for tensor in outputs[0].grad_fn.saved_tensors if tensor.dim() == 4]
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr() for x in inputs]
    del saved
    sum(y.pow(3).sum() for y in outputs).backward()
    gradients = {x.grad.untyped_storage().data_ptr() for x in inputs}
    assert {address for address, _ in storages_of_the_size_of(inputs[0]) - before} == made | gradients


@pytest.mark.parametrize("graph_kind", ["joined"], indirect=True)
def test_the_only_large_tensor_that_a_joined_batch_holds_is_one_copy(run_replicas):
    inputs = [torch.randn(4, C, 8, 8, requires_grad=True) for _ in range(2)]
    whole = 2 * inputs[0].untyped_storage().nbytes()
    before = storages_of_the_size_of(inputs[0])
    outputs = run_replicas(SynchronizedBatchNorm2d(C), inputs)
    made = storages_of_the_size_of(inputs[0]) - before
    assert [size for _, size in made] == [whole, whole]  # of all outputs, and of the copy
    assert {y.untyped_storage().data_ptr() for y in outputs} < {address for address, _ in made}
    sum(y.pow(3).sum() for y in outputs).backward()
    gradients = {x.grad.untyped_storage().data_ptr() for x in inputs}
    del outputs
    assert {address for address, _ in storages_of_the_size_of(inputs[0]) - before} == gradients
