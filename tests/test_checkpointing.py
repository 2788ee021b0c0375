"""A gradient checkpoint recomputes a replica's forward without asking the others again."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn_convert import convert_model

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Checkpointed(nn.Module):
    """Runs what it holds inside a checkpoint."""

    def __init__(self, module, use_reentrant):
        super().__init__()
        self.module = module
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


def checkpoint_some(net, use_reentrant):
    """Checkpoint both residual blocks, one by one."""
    for index in (3, 4):
        net[index] = Checkpointed(net[index], use_reentrant)
    return net


def checkpoint_nested(net, use_reentrant):
    """Checkpoint the blocks inside of a checkpoint."""
    inner = checkpoint_some(net, use_reentrant)
    return nn.Sequential(*inner[:2], Checkpointed(inner[2:5], use_reentrant), *inner[5:])


def checkpoint_all(net, use_reentrant):
    """Checkpoint all that a replica does."""
    return Checkpointed(net, use_reentrant)


@contextmanager
def right_or_error(remedy):
    """Accept an error that says what to do instead."""
    try:
        yield
    except RuntimeError as error:
        if remedy not in str(error):
            raise


@pytest.mark.parametrize("where", [checkpoint_some, checkpoint_nested, checkpoint_all])
def test_without_reentry_it_equals_the_whole_batch_and_updates_the_statistics_once(
    where, residual_net, split_as, train_step, assert_close
):
    replicas = split_as(convert_model(where(residual_net(), False)), [3, 1, 2])
    whole = residual_net()
    for _ in range(2):
        x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
        actual, expected = train_step(replicas, x), train_step(whole, x)
        assert_close(dict(zip(expected, actual.values(), strict=True)), expected, **EXACT)


@pytest.mark.parametrize("where", [checkpoint_some, checkpoint_all])  # torch itself warns of nested ones
def test_with_reentry_it_is_right_or_an_error_that_says_what_to_write(
    where, residual_net, split_as, train_step, assert_close
):
    replicas = split_as(convert_model(where(residual_net(), True)), [3, 1, 2])
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    expected = train_step(residual_net(), x)
    with right_or_error("use_reentrant=False"):
        actual = train_step(replicas, x)
        assert_close(dict(zip(expected, actual.values(), strict=True)), expected, **EXACT)


def test_a_retained_graph_can_be_differentiated_twice(residual_net, split_as, weighted_sum):
    replicas = split_as(convert_model(checkpoint_some(residual_net(), False)), [3, 1, 2])
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    loss = weighted_sum(replicas(x))
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_around_all_replicas_it_is_right_or_an_error_that_says_where_to_put_it(
    use_reentrant, residual_net, split_as, train_step, assert_close
):
    model = Checkpointed(split_as(convert_model(residual_net()), [3, 1, 2]), use_reentrant)
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    expected = train_step(residual_net(), x)
    with right_or_error("put the checkpoint inside the module"):
        actual = train_step(model, x)
        assert_close(dict(zip(expected, actual.values(), strict=True)), expected, **EXACT)


def test_the_composite_path_inside_one_is_right_or_an_error(residual_net, split_as, train_step, assert_close):
    replicas = split_as(convert_model(checkpoint_some(residual_net(), False), fused=False), [3, 1, 2])
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    expected = train_step(residual_net(), x)
    with right_or_error("fused"):
        actual = train_step(replicas, x)
        assert_close(dict(zip(expected, actual.values(), strict=True)), expected, **EXACT)
