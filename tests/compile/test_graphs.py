"""What a compiler gets to see: one graph without a break, and one collective each way per layer."""

import copy
import os
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn_convert import convert_model
from syncbn_core import SynchronizedBatchNorm2d, _compiled
from syncbn_core._processes import collectives

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )


def explain(world):
    explanation = torch._dynamo.explain(convert_model(net()))(torch.randn(3, 3, 2, 2))
    return explanation.graph_count, explanation.graph_break_count


def test_a_net_over_processes_is_one_graph(workers):
    assert workers(2).run(explain) == [(1, 0)] * 2


def counting_backend(found):
    """Build a backend that counts the collectives in the graphs of forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    def counting(direction):
        def compiler(graph, example_inputs):
            names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            found[direction].update(
                name.split(".")[1] for name in names if name.startswith("_c10d_functional")
            )
            return graph

        return compiler

    return aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))


def count_collectives(world, checkpointed):
    found = {"forward": Counter(), "backward": Counter()}
    model = convert_model(net())

    def call(x):
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    compiled = torch.compile(call, backend=counting_backend(found), fullgraph=True)
    for size in (3 + world.rank, 3 + world.rank):
        y = compiled(torch.randn(size, 3, 2, 2))
        (y * torch.randn(y.shape)).sum().backward()
    return found


# Before torch 2.13, the backward on the CPU repeats the forward's collectives, as their results are asserted.
COPIES = 1 if torch.__version__ >= (2, 13) else 2


def test_there_is_one_collective_each_way_per_layer(workers):
    for found in workers(2).run(count_collectives, False):
        forward = {"all_gather_into_tensor": 2, "wait_tensor": 2}
        backward = {name: COPIES * count for name, count in forward.items()}
        assert found == {"forward": forward, "backward": backward}


def train_on_an_older_torch(world):
    with mock.patch.object(_compiled, "_TRACES_COLLECTIVES", False):
        model, twin = convert_model(net().double()), net().double()
        twin.load_state_dict(model.state_dict())
        whole = torch.randn(7, 3, 2, 2, dtype=torch.float64)
        compiled = torch.compile(model, backend="aot_eager")
        world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, [4, 3], **EXACT)
        try:
            torch.compile(model, backend="aot_eager", fullgraph=True)(world.share(whole, [4, 3]))
        except torch._dynamo.exc.TorchDynamoException as error:
            return str(error)
        return "no error"


def test_on_an_older_torch_the_graph_breaks_at_a_layer(workers):
    for error in workers(2).run(train_on_an_older_torch):
        assert _compiled.REASON in error


def count_more(world):
    with mock.patch.object(collectives, "MANY", 2):
        model, twin = convert_model(net().double()), net().double()
        twin.load_state_dict(model.state_dict())
        found = {"forward": Counter(), "backward": Counter()}
        compiled = torch.compile(model, backend=counting_backend(found), fullgraph=True)
        whole = torch.randn(7, 3, 2, 2, dtype=torch.float64)
        world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, [4, 3], **EXACT)
    return found["backward"]


def test_beyond_eight_processes_the_backward_reduces(workers):
    for found in workers(2).run(count_more):
        assert found == {"all_reduce": 2 * COPIES, "wait_tensor": 2 * COPIES}


def train_checkpointed(world):
    model, twin = convert_model(net().double()), net().double()
    twin.load_state_dict(model.state_dict())

    def call(x):
        return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for step in range(3):
        torch.manual_seed(step)
        whole = torch.randn(7, 3, 2, 2, dtype=torch.float64)
        world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, [4, 3], **EXACT)


def test_a_checkpoint_inside_the_graph_updates_the_running_statistics_once(workers):
    workers(2).run(train_checkpointed)


def no_read_by_the_host(world):
    """List what in the graphs would make the host wait for a device."""
    reads = []

    def looking(graph, example_inputs):
        names = [str(node.target) for node in graph.graph.nodes]
        reads.extend(name for name in names if "_local_scalar_dense" in name or "nonzero" in name)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=looking, bw_compiler=looking)
    model = convert_model(nn.Sequential(net(), nn.BatchNorm2d(2, momentum=None)))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    y = compiled(torch.randn(3 * world.rank, 3, 2, 2))  # none in process 0
    (y * torch.randn(y.shape)).sum().backward()
    return reads


def test_nothing_in_the_graph_is_read_by_the_host(workers):
    assert workers(2).run(no_read_by_the_host) == [[], []]


def wrong_inputs(world, dynamic):
    layer = SynchronizedBatchNorm2d(3)
    compiled = torch.compile(layer, backend="eager", dynamic=dynamic)
    with pytest.raises(
        ValueError, match=r"expected 3 channels \(num_features\) .* got 4 in an input of shape"
    ):
        compiled(torch.randn(5, 4, 2, 2))
    with pytest.raises(ValueError, match=r"expected 4D input .* got 3D input of shape \(5, 3, 2\)"):
        compiled(torch.randn(5, 3, 2))
    with pytest.raises(TypeError, match="expected a floating-point input"):
        compiled(torch.ones(5, 3, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_wrong_inputs_are_the_errors_of_the_layer(dynamic, workers):
    workers(2).run(wrong_inputs, dynamic)


class OwnStatistics(SynchronizedBatchNorm2d):
    """A layer with a formula of its own."""

    def _compute_mean_std(self, mean, m2, count):
        mean, invstd = super()._compute_mean_std(mean, m2, count)
        return mean, invstd * 2


def train_own_statistics(world):
    layer = OwnStatistics(3, fused=False).double()
    whole = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    expected = 2 * nn.BatchNorm2d(3).double()(whole)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(world.share(whole, [4, 3])), world.share(expected, [4, 3]))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="its hooks are overridden"):
        torch.compile(layer, backend="eager", fullgraph=True)(world.share(whole, [4, 3]))


def test_a_layer_with_overridden_hooks_breaks_the_graph_says_why_and_is_right(workers):
    workers(2).run(train_own_statistics)


def train_checked(world):
    model, twin = convert_model(net().double()), net().double()
    twin.load_state_dict(model.state_dict())
    with mock.patch.dict(os.environ, {"SYNCBN_CHECK": "1"}):
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            whole = torch.randn(7, 3, 2, 2, dtype=torch.float64)
            world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, [4, 3], **EXACT)
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="SYNCBN_CHECK is set"):
            torch.compile(model, backend="eager", fullgraph=True)(whole)


def test_the_check_of_places_breaks_the_graph_and_is_right(workers):
    workers(2).run(train_checked)


def go_astray(world, phase, compiling, many):
    """Run one of two layers of one width, another one in each process."""
    layers = convert_model(nn.ModuleDict({"stem": nn.BatchNorm2d(3), "head": nn.BatchNorm2d(3)}))
    called = {
        name: torch.compile(layer, backend="aot_eager", fullgraph=True) if world.rank in compiling else layer
        for name, layer in layers.items()
    }
    x, mine = torch.randn(2, 3, 2, 2, requires_grad=True), ("stem", "head")[world.rank]
    try:
        with mock.patch.object(collectives, "MANY", many):
            if phase == "forward":
                called[mine](x)
            else:
                ys = {name: layer(x) for name, layer in called.items()}
                ys[mine].square().sum().backward()
    except RuntimeError as error:
        return str(error)


@pytest.mark.pairwise
@pytest.mark.parametrize("many", [2, 9], ids=["sum", "gather"])
@pytest.mark.parametrize("compiling", [[0, 1], [1]], ids=["both compiled", "one compiled"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_processes_at_different_layers_of_one_width_get_an_error(phase, compiling, many, workers):
    errors = workers(2).run(go_astray, phase, compiling, many)
    for error, name in zip(errors, ("stem", "head"), strict=True):
        assert error.startswith(f"expected all processes in the {phase} of '{name}'"), error
        assert "at another layer" in error


def differentiate_by_a_transform(world):
    torch.manual_seed(0)
    twin = nn.BatchNorm2d(3, track_running_stats=False).double()
    layer = convert_model(copy.deepcopy(twin))
    whole, weights = torch.randn(2, 7, 3, 2, 2, dtype=torch.float64)
    mine = world.share(weights, [4, 3])

    def gradient(x):
        return torch.func.grad(lambda x: (layer(x) * mine).sum())(x)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    whole.requires_grad_()
    (expected,) = torch.autograd.grad((twin(whole) * weights).sum(), whole)
    torch.testing.assert_close(
        compiled(world.share(whole.detach(), [4, 3])), world.share(expected, [4, 3]), **EXACT
    )
    for transform in (
        lambda x: torch.func.vmap(layer)(torch.stack([x, x])),
        lambda x: torch.func.jvp(layer, (x,), (x,))[1],
    ):
        # An error of the compiler, or, where it breaks the graph at the transform, that of the layer.
        refusals = r"Batching rule not implemented|You must implement the jvp|outside of function transforms"
        with pytest.raises(Exception, match=refusals):
            torch.compile(transform, backend="aot_eager")(mine)


def test_transforms_inside_of_the_graph_are_right_or_an_error(workers):
    workers(2).run(differentiate_by_a_transform)
