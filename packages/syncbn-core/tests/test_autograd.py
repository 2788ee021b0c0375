"""The backward does the same as torch's own layer for partial, repeated, frozen and unused gradients."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from syncbn_core import SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("graph_kind")

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
SIZES = [2, 1, 3]
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def layer_of(randomize):
    def make(**options):
        return randomize(SynchronizedBatchNorm2d(3, dtype=torch.float64, **options))

    return make


@pytest.fixture
def chunks():
    return [torch.randn(size, 3, 2, 2, dtype=torch.float64, requires_grad=True) for size in SIZES]


@pytest.fixture
def loss_of(run_replicas, weighted_sum):
    def loss(layer, chunks, used=slice(None)):
        return weighted_sum(torch.cat(run_replicas(layer, chunks)[used]))

    return loss


@FUSED
@pytest.mark.parametrize("options", [{}, {"eps_mode": "clamp", "eps": 0.5}, {"affine": False}], ids=str)
def test_first_derivatives_are_those_of_finite_differences(fused, options, layer_of, run_replicas):
    layer = layer_of(fused=fused, **options)
    chunks = [torch.randn(size, 3, 2, dtype=torch.float64).unsqueeze(-1) for size in SIZES]
    chunks = [(chunk * torch.tensor([0.1, 1, 3]).view(3, 1, 1)).requires_grad_() for chunk in chunks]
    parameters = list(layer.parameters())

    def forward(*tensors):
        return tuple(run_replicas(layer, tensors[: len(chunks)]))

    assert torch.autograd.gradcheck(forward, (*chunks, *parameters))


@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
def test_second_derivatives_of_the_composite_path_are_those_of_finite_differences(
    eps_mode, layer_of, chunks, run_replicas
):
    layer = layer_of(fused=False, eps_mode=eps_mode)
    assert torch.autograd.gradgradcheck(lambda *tensors: tuple(run_replicas(layer, tensors)), chunks)


def test_a_gradient_penalty_through_the_composite_path_is_that_of_the_whole_batch(
    layer_of, chunks, stock_twin, loss_of, weighted_sum
):
    layer = layer_of(fused=False)
    twin = stock_twin(layer, 4)
    gradients = torch.autograd.grad(loss_of(layer, chunks), chunks, create_graph=True)
    sum(g.pow(2).sum() for g in gradients).backward()

    batch = torch.cat(chunks).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(weighted_sum(twin(batch)), batch, create_graph=True)
    gradient.pow(2).sum().backward()
    torch.testing.assert_close(torch.cat([chunk.grad for chunk in chunks]), batch.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("wanted", "options"),
    [("inputs", {}), ("weight", {}), ("all", {}), ("inputs", {"affine": False})],
    ids=["inputs", "weight", "all", "inputs of a layer without weight"],
)
def test_a_second_derivative_through_the_fused_path_is_an_error_that_says_what_to_do(
    wanted, options, layer_of, chunks, loss_of
):
    layer = layer_of(**options)
    sources = {"inputs": chunks, "weight": [layer.weight], "all": [*chunks, *layer.parameters()]}[wanted]
    gradients = torch.autograd.grad(loss_of(layer, chunks), sources, create_graph=True)
    with pytest.raises(RuntimeError, match=r"through net, .*fused=False"):
        sum(g.pow(2).sum() for g in gradients).backward()


def test_a_first_derivative_with_create_graph_is_right_if_it_is_not_differentiated(layer_of, chunks, loss_of):
    layer = layer_of()
    sources = [*chunks, *layer.parameters()]
    expected = torch.autograd.grad(loss_of(layer, chunks), sources)
    actual = torch.autograd.grad(loss_of(layer, chunks), sources, create_graph=True)
    torch.testing.assert_close([g.detach() for g in actual], list(expected), rtol=0, atol=0)


@FUSED
def test_a_second_backward_adds_the_same_again(fused, layer_of, chunks, loss_of):
    layer = layer_of(fused=fused)
    loss = loss_of(layer, chunks)
    loss.backward(retain_graph=True)
    leaves = [*chunks, *layer.parameters()]
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], [2 * g for g in once], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.pairwise
@FUSED
@pytest.mark.parametrize("wanted", [[0], [2], [0, 1], [3], [4], [1, 4]], ids=str)
def test_a_subset_of_the_gradients_equals_that_part_of_all(fused, wanted, layer_of, chunks, loss_of):
    layer = layer_of(fused=fused)
    leaves = [*chunks, *layer.parameters()]
    full = torch.autograd.grad(loss_of(layer, chunks), leaves)
    subset = torch.autograd.grad(loss_of(layer, chunks), [leaves[i] for i in wanted])
    torch.testing.assert_close(subset, tuple(full[i] for i in wanted), **TIGHT)


@pytest.mark.pairwise
@FUSED
@pytest.mark.parametrize(
    "frozen", [["weight"], ["bias"], ["weight", "bias"], ["x0"], ["x1", "x2"], ["x0", "x1", "x2"]], ids=str
)
def test_tensors_that_need_no_gradient_get_none_and_change_no_other(
    fused, frozen, layer_of, chunks, stock_twin, loss_of, weighted_sum
):
    layer = layer_of(fused=fused)
    leaves = {"weight": layer.weight, "bias": layer.bias, **{f"x{i}": x for i, x in enumerate(chunks)}}
    for name in frozen:
        leaves[name].requires_grad_(False)
    twin = stock_twin(layer, 4)
    batch = torch.cat(chunks).detach().requires_grad_()
    weighted_sum(twin(batch)).backward()
    dx = dict(zip(["x0", "x1", "x2"], batch.grad.split(SIZES)))
    expected = {"weight": twin.weight.grad, "bias": twin.bias.grad, **dx}

    loss_of(layer, chunks).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, None if name in frozen else expected[name], **TIGHT)


@FUSED
@pytest.mark.parametrize("ignored", [0, 1, 2])
def test_a_replica_that_the_loss_ignores_still_gets_its_gradient(
    fused, ignored, layer_of, chunks, stock_twin, run_replicas, weighted_sum
):
    layer = layer_of(fused=fused)
    twin = stock_twin(layer, 4)
    batch = torch.cat(chunks).detach().requires_grad_()
    for outputs, inputs in ((run_replicas(layer, chunks), chunks), (twin(batch).split(SIZES), [batch])):
        used = [weighted_sum(y) for rank, y in enumerate(outputs) if rank != ignored]
        sum(used).backward()
        assert all(x.grad is not None for x in inputs)
    torch.testing.assert_close(torch.cat([chunk.grad for chunk in chunks]), batch.grad, **TIGHT)
    for ours, theirs in zip(layer.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, **TIGHT)


@FUSED
def test_an_expanded_gradient_is_accepted(fused, layer_of, chunks, stock_twin, run_replicas):
    layer = layer_of(fused=fused)
    twin = stock_twin(layer, 4)
    batch = torch.cat(chunks).detach().requires_grad_()
    twin(batch)[:2].mean().backward()
    run_replicas(layer, chunks)[0].mean().backward()
    torch.testing.assert_close(torch.cat([chunk.grad for chunk in chunks]), batch.grad, **TIGHT)


@pytest.mark.parametrize("graph_kind", ["one node"], indirect=True)
def test_an_input_changed_in_place_before_backward_is_torchs_own_error(layer_of, chunks, run_replicas):
    inputs = [chunk * 1 for chunk in chunks]
    outputs = run_replicas(layer_of(), inputs)
    inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in outputs).backward()


@pytest.mark.parametrize("graph_kind", ["joined"], indirect=True)
def test_an_input_that_was_copied_may_be_changed_in_place_before_backward(
    layer_of, chunks, stock_twin, run_replicas, weighted_sum
):
    layer = layer_of()
    twin = stock_twin(layer, 4)
    batch = torch.cat(chunks).detach().requires_grad_()
    weighted_sum(twin(batch)).backward()
    inputs = [chunk * 1 for chunk in chunks]
    outputs = run_replicas(layer, inputs)
    inputs[1].add_(1)
    weighted_sum(torch.cat(outputs)).backward()
    torch.testing.assert_close(torch.cat([chunk.grad for chunk in chunks]), batch.grad, **TIGHT)
    for ours, theirs in zip(layer.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, **TIGHT)


@FUSED
def test_an_output_may_be_changed_in_place(fused, layer_of, chunks, stock_twin, run_replicas, weighted_sum):
    layer = layer_of(fused=fused)
    twin = nn.Sequential(stock_twin(layer, 4), nn.ReLU(inplace=True))
    batch = torch.cat(chunks).detach().requires_grad_()
    weighted_sum(twin(batch)).backward()
    outputs = run_replicas(nn.Sequential(layer, nn.ReLU(inplace=True)), chunks)
    weighted_sum(torch.cat(outputs)).backward()
    torch.testing.assert_close(torch.cat([chunk.grad for chunk in chunks]), batch.grad, **TIGHT)


@FUSED
def test_without_grad_mode_there_is_no_graph(fused, layer_of, chunks, run_replicas):
    layer = layer_of(fused=fused)
    with torch.no_grad():
        outputs = run_replicas(layer, chunks)
    assert not any(y.requires_grad for y in outputs)
    assert layer.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's forward mode itself
def test_forward_mode_through_the_composite_path_is_that_of_finite_differences(
    layer_of, chunks, run_replicas
):
    layer = layer_of(fused=False)
    inputs = [chunk.detach() for chunk in chunks]
    tangents = [torch.randn_like(x) for x in inputs]
    with forward_ad.dual_level():
        outputs = run_replicas(layer, [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)])
        actual = torch.cat([forward_ad.unpack_dual(y).tangent for y in outputs])
        assert forward_ad.unpack_dual(layer.running_mean).tangent is None
        assert forward_ad.unpack_dual(layer.running_var).tangent is None

    step = 1e-6
    ahead, behind = (
        torch.cat(run_replicas(layer, [x + sign * step * t for x, t in zip(inputs, tangents)]))
        for sign in (1, -1)
    )
    torch.testing.assert_close(actual, (ahead - behind).detach() / (2 * step), rtol=1e-6, atol=1e-7)
