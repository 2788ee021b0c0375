"""Inputs of a subclass of Tensor give outputs of that subclass, as from torch's own layer, in every way."""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm2d

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
WAYS = [  # of replicas; a composite layer has only one
    *(("joined", True), ("one node", True), ("three nodes", True), ("joined", False)),
]


class Labeled(torch.Tensor):
    """A tensor with a label that the results of operations take over, as with MONAI's MetaTensor."""

    label = "none"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        labels = [a.label for a in args if isinstance(a, Labeled)]
        if isinstance(result, Labeled) and labels:
            result.label = labels[0]
        return result


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Bare(torch.Tensor):
    """A subclass whose results are plain tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if isinstance(result, Bare) else result


class Opaque(torch.Tensor):
    """A subclass that operations do not see, as nn.Parameter is."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def wrapped(kind, x):
    x = x.as_subclass(kind)
    if kind is Labeled:
        x.label = "scan 7"
    return x


@pytest.mark.pairwise
@pytest.mark.parametrize(("graph_kind", "fused"), WAYS, indirect=["graph_kind"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place activation", "no activation"])
@pytest.mark.parametrize("kind", [Labeled, Plain, Bare, Opaque, nn.Parameter])
def test_replicas_give_what_torchs_own_layer_gives(
    kind, in_place, graph_kind, fused, layer_of, stock_twin, chunks_of, run_replicas, weighted_sum
):
    layer = layer_of(fused=fused)
    twin = stock_twin(layer, 4)
    behind = [nn.ReLU(inplace=True)] if in_place else []
    leaves = [x.requires_grad_() for x in chunks_of(2, 1, 3)]
    batch = torch.cat([x.detach() for x in leaves]).requires_grad_()
    if kind is nn.Parameter:
        leaves, whole = [nn.Parameter(x.detach()) for x in leaves], nn.Parameter(batch.detach())
        batch, inputs = whole, leaves
    else:
        inputs, whole = [wrapped(kind, x) for x in leaves], wrapped(kind, batch)

    outputs = run_replicas(nn.Sequential(layer, *behind), inputs)
    expected = nn.Sequential(twin, *behind)(whole)
    assert {type(y) for y in outputs} == {type(expected)}
    if kind is Labeled:
        assert {y.label for y in outputs} == {"scan 7"}
    y = torch.cat([y.as_subclass(torch.Tensor) for y in outputs])
    torch.testing.assert_close(y, expected.as_subclass(torch.Tensor), **TIGHT)
    weighted_sum(y).backward()
    weighted_sum(expected.as_subclass(torch.Tensor)).backward()
    torch.testing.assert_close(torch.cat([x.grad for x in leaves]), batch.grad, **TIGHT)
    for ours, theirs in zip(layer.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, **TIGHT)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
def test_a_layer_without_replicas_gives_the_same(eps_mode, training):
    layer = SynchronizedBatchNorm2d(4, eps_mode=eps_mode).train(training)
    y = layer(wrapped(Labeled, torch.randn(2, 4, 3, 5)))
    assert type(y) is Labeled
    assert y.label == "scan 7"
