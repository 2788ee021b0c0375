"""A failure in a converted model names replica and layer, harms nothing, and the next forward is right."""

import copy
import re

import pytest
import torch
from torch import nn

from syncbn_comm import BrokenSyncError, ReplicaLeftError
from syncbn_convert import convert_model

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LAYERS = ["1", "3.bn2", "8"]  # first, middle, last


class OutOfMemory(RuntimeError):
    """The exception that a replica raises."""


def fail_at(model, layer, rank, sizes, action):
    """Run ``action`` in place of one layer's call in one replica, found by the size of its batch."""
    module = model.get_submodule(layer)

    def hook(module, args):
        if len(args[0]) == sizes[rank]:
            action()

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("kind", [OutOfMemory, KeyboardInterrupt])
def test_the_exception_of_a_replica_is_raised_unchanged_and_the_next_step_is_right(
    layer, rank, kind, residual_net, split_as, train_step, assert_close
):
    sizes = [3, 1, 2, 4]
    x = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64)
    replicas, whole = split_as(convert_model(residual_net()), sizes), residual_net()
    assert_close(train_step(replicas, x), train_step(whole, x), **EXACT)
    failure = kind("no memory left")

    def fail():
        raise failure

    handle = fail_at(replicas.module, layer, rank, sizes, fail)
    before = copy.deepcopy(replicas.state_dict())
    with pytest.raises(kind) as caught:
        replicas(x)
    assert caught.value is failure
    note = "\n".join(failure.__notes__)
    assert f"replica {rank} (of 0 to 3) on cpu" in note
    assert f"{layer!r}" in note
    handle.remove()

    name = f"module.{layer}.running_mean"
    torch.testing.assert_close(replicas.state_dict()[name], before[name], rtol=0, atol=0)
    replicas.load_state_dict(before)  # layers before the failed one have updated theirs
    assert_close(train_step(replicas, x), train_step(whole, x), **EXACT)


class Conditional(nn.Module):
    """Replicas with a negative input call other layers."""

    def __init__(self, own_way):
        super().__init__()
        self.first = nn.BatchNorm1d(2)
        self.second = nn.BatchNorm1d(2)
        self.own_way = own_way

    def forward(self, x):
        if x.amax() < 0:
            return self.own_way(self, x)
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("own_way", "kind", "message"),
    [
        (lambda m, x: x, ReplicaLeftError, "replica 2 finished without reaching 'first' (call 1)"),
        (lambda m, x: m.first(x), ReplicaLeftError, "replica 2 finished without reaching 'second' (call 1)"),
        (lambda m, x: m.first(m.second(x)), BrokenSyncError, "replica 2 at 'second' (call 1)"),
        (lambda m, x: m.second(m.second(m.first(x))), ReplicaLeftError, "reaching 'second' (call 2)"),
    ],
    ids=["skips-all", "skips-one", "other-order", "one-call-more"],
)
def test_replicas_that_call_different_layers_are_an_error_that_names_the_layer(
    own_way, kind, message, split_as
):
    replicas = split_as(convert_model(Conditional(own_way)), [2, 2, 2])
    good = torch.rand(6, 2) + 0.1
    bad = torch.cat([good[:4], -good[4:]])
    with pytest.raises(kind, match=re.escape(message)):
        replicas(bad)
    torch.testing.assert_close(replicas(good), Conditional(own_way)(good))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float(), "at '?1'?.*float32"),
        (lambda x: torch.cat([x, x], dim=1), "8 channels .*at '?1'?, got 16"),
        (lambda x: x[0], "at '?1'?"),
        (lambda x: x.long(), "at '?1'?, got torch.int64"),
    ],
    ids=["other-dtype", "other-channels", "other-dimensions", "integers"],
)
def test_a_replica_with_another_kind_of_input_is_an_error_that_names_the_layer(
    change, message, residual_net, split_as, train_step, assert_close
):
    sizes = [3, 1, 2]
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    replicas = split_as(convert_model(residual_net()), sizes)
    layer = replicas.module[1]
    handle = layer.register_forward_pre_hook(
        lambda _, args: (change(args[0]),) if len(args[0]) == 1 else None
    )
    with pytest.raises(Exception, match=message):
        replicas(x)
    handle.remove()
    torch.testing.assert_close(replicas(x), residual_net()(x), **EXACT)
