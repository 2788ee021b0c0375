"""Over processes too: subclasses of Tensor as inputs, many gradients at once, and reentrant checkpoints."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn_comm import BrokenSyncError
from syncbn_core import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Labeled(torch.Tensor):
    """A tensor with a label that the results of operations take over."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        labels = [a.label for a in args if isinstance(a, Labeled) and hasattr(a, "label")]
        if isinstance(result, Labeled) and labels:
            result.label = labels[0]
        return result


def train_on_subclass(world, fused):
    model = nn.Sequential(SynchronizedBatchNorm2d(3, fused=fused), nn.ReLU(inplace=True)).double()
    twin = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double()
    whole = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    leaf = world.share(whole).clone().requires_grad_()
    x = leaf.as_subclass(Labeled)
    x.label = "scan 7"
    y = model(x)
    assert type(y) is Labeled
    assert y.label == "scan 7"
    weights = torch.randn(whole.shape, dtype=torch.float64)
    (y.as_subclass(torch.Tensor) * world.share(weights)).sum().backward()
    whole.requires_grad_()
    (twin(whole) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, world.share(whole.grad), **EXACT)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_the_output_keeps_the_subclass_of_tensor(fused, processes):
    processes(2).run(train_on_subclass, fused)


def ask_for_many_gradients(world, fused):
    layer = SynchronizedBatchNorm1d(3, fused=fused).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dys = torch.randn(4, 2, 3, dtype=torch.float64)
    try:
        torch.autograd.grad(y, x, dys, is_grads_batched=True)
    except (RuntimeError, BrokenSyncError) as error:
        return str(error)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_many_gradients_at_once_are_an_error_that_says_so(fused, processes):
    for error in processes(2).run(ask_for_many_gradients, fused):
        assert "expected one gradient at a time in the backward of 'SynchronizedBatchNorm1d'" in error
        assert "is_grads_batched=True" in error


def transform(name, options):
    layer = SynchronizedBatchNorm1d(3, track_running_stats=False, **options).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    if name == "vmap":
        return torch.func.vmap(layer)(x.expand(2, 4, 3)).sum().item()
    if name == "jvp":
        return torch.func.jvp(layer, (x,), (x,))[1].sum().item()
    return torch.func.grad(lambda x: (layer(x) ** 3).sum())(x).sum().item()


def transform_and_fail(world, name, options):
    with warnings.catch_warnings():
        # torch says this of itself where it first needs a derivative in forward mode.
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", DeprecationWarning)
        try:
            return transform(name, options)
        except RuntimeError as error:
            return str(error)


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_function_transforms_are_an_error_that_says_what_to_do(name, fused, processes):
    for error in processes(2).run(transform_and_fail, name, {"fused": fused}):
        assert "expected the forward of 'SynchronizedBatchNorm1d' over several processes outside of" in error
        assert "process_group=THIS_PROCESS" in error


class Twice(nn.Module):
    """Two calls, of one layer or of two layers."""

    def __init__(self, is_shared):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.second = self.first if is_shared else nn.BatchNorm1d(3)

    def forward(self, x):
        return self.second(self.first(x) ** 3)


def train_in_a_checkpoint(world, is_shared, use_reentrant):
    twin = Twice(is_shared).double()
    model = copy.deepcopy(twin)
    for layer in (model.first, model.second):
        layer.__class__ = SynchronizedBatchNorm1d
    whole = torch.randn(8, 3, dtype=torch.float64)
    weights = torch.randn(8, 3, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        ours, theirs = world.share(whole).clone().requires_grad_(), whole.clone().requires_grad_()
        y = checkpoint(model, ours, use_reentrant=use_reentrant)
        (y * world.share(weights)).sum().backward()
        expected = twin(theirs)
        (expected * weights).sum().backward()
        torch.testing.assert_close(y, world.share(expected), **EXACT)
        torch.testing.assert_close(ours.grad, world.share(theirs.grad), **EXACT)
        gradients = {name: p.grad for name, p in twin.named_parameters()}
        torch.testing.assert_close(world.total_gradients(model), gradients, **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("is_shared", [True, False], ids=["one layer", "two layers"])
def test_a_checkpoint_around_two_calls_is_exact(is_shared, use_reentrant, processes):
    processes(2).run(train_in_a_checkpoint, is_shared, use_reentrant)
