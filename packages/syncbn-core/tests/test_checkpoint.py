"""Gradient checkpoints inside replicas: a recomputation reuses the statistics and waits for no other."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn_core import SynchronizedBatchNorm1d

pytestmark = pytest.mark.usefixtures("graph_kind")

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def recomputed(part, x):
    return checkpoint(part, x, use_reentrant=False)


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def remembered(part, x):
    return part(x)


def everything(call, model, x):
    return call(model, x)


def the_first_part(call, model, x):
    return model[2:](call(model[:2], x))


def the_last_part(call, model, x):
    return call(model[2:], model[:2](x))


def every_module_by_itself(call, model, x):
    for module in model:
        x = call(module, x)
    return x


def one_layer_twice_in_two_checkpoints(call, model, x):
    return model[2:](call(model[1], call(model[:2], x)))


def one_layer_twice_in_one_checkpoint(call, model, x):
    return call(nn.Sequential(*model, model[1], model[0], model[1]), x)


def one_layer_in_a_checkpoint_and_without(call, model, x):
    return model(call(model[1], x.tanh()))


def a_checkpoint_in_a_checkpoint(call, model, x):
    return call(lambda x: call(model[2:], call(model[:2], x)), x)


WAYS = [
    everything,
    the_first_part,
    the_last_part,
    every_module_by_itself,
    one_layer_twice_in_two_checkpoints,
    one_layer_twice_in_one_checkpoint,
    one_layer_in_a_checkpoint_and_without,
    a_checkpoint_in_a_checkpoint,
]


def make_model(**options):
    layers = [SynchronizedBatchNorm1d(3, **options) for _ in range(2)]
    return nn.Sequential(nn.Linear(3, 3), layers[0], nn.Tanh(), nn.Linear(3, 3), layers[1]).double()


@pytest.fixture
def inputs():
    return [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (4, 2, 3)]


@pytest.fixture
def gradients_of(replicas_of, weighted_sum):
    """The gradients of one forward by ``way(call, replica, x)``, averaged over some backwards."""

    def gradients(model, inputs, way, call, backwards=1):
        leaves = [*inputs, *model.parameters()]
        for leaf in leaves:
            leaf.grad = None
        outputs = replicas_of(model, len(inputs)).run(lambda replica, rank: way(call, replica, inputs[rank]))
        # All replicas have left their group: a replica that tried to synchronize now would get an error.
        loss = weighted_sum(torch.cat(outputs))
        for left in reversed(range(backwards)):
            loss.backward(retain_graph=left > 0)
        return [None if leaf.grad is None else leaf.grad / backwards for leaf in leaves]

    return gradients


@pytest.mark.pairwise
@pytest.mark.parametrize("backwards", [1, 2], ids=["one backward", "retain_graph"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps_mode": "clamp", "eps": 0.3}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_running_statistics_are_those_without_checkpoints(
    way, options, backwards, inputs, gradients_of
):
    model = make_model(**options)
    plain = copy.deepcopy(model)
    actual = gradients_of(model, inputs, way, recomputed, backwards)
    torch.testing.assert_close(actual, gradients_of(plain, inputs, way, remembered), **TIGHT)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), **TIGHT)


@pytest.mark.pairwise
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("needing", [[], [0], [1, 2]], ids=str)
def test_inputs_that_need_no_gradient_change_nothing(needing, affine, inputs, gradients_of):
    # The layer comes first, so that nothing before it needs a gradient either.
    model = nn.Sequential(SynchronizedBatchNorm1d(3, affine=affine), nn.Linear(3, 3)).double()
    for rank, x in enumerate(inputs):
        x.requires_grad_(rank in needing)
    actual = gradients_of(model, inputs, everything, recomputed)
    torch.testing.assert_close(actual, gradients_of(model, inputs, everything, remembered), **TIGHT)


def test_a_checkpoint_in_one_replica_alone_changes_nothing(inputs, gradients_of):
    model = make_model()

    def way(call, replica, x):
        return call(replica, x) if x is inputs[1] else replica(x)

    actual = gradients_of(model, inputs, way, recomputed)
    torch.testing.assert_close(actual, gradients_of(model, inputs, way, remembered), **TIGHT)


def test_a_forward_without_gradients_before_changes_nothing(inputs, gradients_of):
    model = make_model()

    def way(call, replica, x):
        with torch.no_grad():
            target = replica(2 * x + 1)
        return call(replica, x) - target

    actual = gradients_of(model, inputs, way, recomputed)
    torch.testing.assert_close(actual, gradients_of(model, inputs, way, remembered), **TIGHT)


def test_a_reentrant_checkpoint_is_an_error_in_the_first_backward(inputs, gradients_of):
    with pytest.raises(RuntimeError, match=r"net\.1.*use_reentrant=False"):
        gradients_of(make_model(), inputs, everything, reentrant)


def test_a_reentrant_checkpoint_is_an_error_even_if_the_layer_also_ran_without_one(inputs, gradients_of):
    with pytest.raises(RuntimeError, match=r"net\.1.*use_reentrant=False"):
        gradients_of(make_model(), inputs, one_layer_in_a_checkpoint_and_without, reentrant)


@pytest.mark.parametrize("way", [everything, the_last_part])
def test_the_composite_path_in_a_checkpoint_is_an_error_that_says_what_to_do(way, inputs, gradients_of):
    with pytest.raises(RuntimeError, match=r"net\.[14].*fused=True, or leave it out of the checkpoint"):
        gradients_of(make_model(fused=False), inputs, way, recomputed)


def test_torch_reports_that_a_backward_is_running():
    # Private to torch: look at this first if the tests above fail with another version.
    inside = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: inside.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    y.backward()
    assert inside != [-1]
    assert torch._C._current_graph_task_id() == -1
