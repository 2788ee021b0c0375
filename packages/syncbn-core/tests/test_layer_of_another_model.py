"""A replica has to call its own copy of a layer: a call of another one is an error."""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm1d

MESSAGE = (
    r"expected replica {rank} \(of 0 to 1\) to call its own copy of '{name}', got a call of a layer that is "
    r"not part of this replica.*self\.bn.*evaluation mode"
)


def named(name):
    layer = SynchronizedBatchNorm1d(3)
    layer.layer_name = name
    return layer


@pytest.mark.parametrize("rank", [0, 1])
def test_a_call_of_the_original_layer_inside_a_replica_is_an_error(rank, replicas_of):
    model = nn.Sequential(named("bn1"))

    def forward(replica, of):
        return (model if of == rank else replica)(torch.randn(2, 3))

    with pytest.raises(RuntimeError, match=MESSAGE.format(rank=rank, name="bn1")):
        replicas_of(model, 2).run(forward)
    assert model[0].num_batches_tracked == 0


def test_a_call_of_a_layer_outside_the_model_is_an_error(replicas_of):
    model, other = nn.Sequential(named("bn1")), named("teacher.bn")
    with pytest.raises(RuntimeError, match=MESSAGE.format(rank=r"\d", name="teacher.bn")):
        replicas_of(model, 2).run(lambda replica, rank: other(replica(torch.randn(2, 3))))


def test_a_call_of_another_replicas_layer_is_an_error(replicas_of):
    model = nn.Sequential(named("bn1"))
    first, second = replicas_of(model, 2), replicas_of(model, 2)
    with pytest.raises(RuntimeError, match=MESSAGE.format(rank=r"\d", name=r"net\.0")):
        first.run(lambda replica, rank: second.modules[rank](torch.randn(2, 3)))


def test_a_layer_outside_the_model_may_be_called_in_evaluation_mode(replicas_of):
    model, other = nn.Sequential(named("bn1")), named("teacher.bn").eval()
    outputs = replicas_of(model, 2).run(lambda replica, rank: other(replica(torch.randn(2, 3))))
    assert all(y.shape == (2, 3) for y in outputs)


def test_one_replica_alone_may_call_any_layer(replicas_of):
    model, other = nn.Sequential(named("bn1")), named("teacher.bn")
    replicas_of(model, 1).run(lambda replica, rank: other(replica(torch.randn(2, 3))))
    assert other.num_batches_tracked == 1


def test_after_the_forward_the_original_layer_may_be_called(replicas_of):
    model = nn.Sequential(named("bn1"))
    replicas_of(model, 2).run(lambda replica, rank: replica(torch.randn(2, 3)))
    model(torch.randn(2, 3))
    assert model[0].num_batches_tracked == 2
