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


def test_a_call_of_another_replicas_copy_is_an_error(replicas_of):
    model = nn.Sequential(named("bn1"))
    replicas = replicas_of(model, 2)
    with pytest.raises(RuntimeError, match=MESSAGE.format(rank=r"\d", name=r"net\.0")):
        replicas.run(lambda replica, rank: replicas.modules[1 - rank](torch.randn(2, 3)))


class Escapes(nn.Module):
    """Calls a layer that an object holds, which no replication follows."""

    def __init__(self):
        super().__init__()
        self.bn = named("bn1")
        self.holder = type("Holder", (), {})()
        self.holder.bn = self.bn

    def forward(self, x):
        return self.holder.bn(x)


def replicas_of_a_stock_data_parallel(model, world_size):
    """Replicate as torch does; nobody tells the replicas of each other."""
    modules = list(model.modules())
    copies = {
        module: [module._replicate_for_data_parallel() for _ in range(world_size)] for module in modules
    }
    for module in modules:
        for rank, replica in enumerate(copies[module]):
            replica._modules = {name: copies[child][rank] for name, child in module.named_children()}
            replica._parameters = dict(module._parameters)
    return copies[model]


def test_a_call_of_the_original_layer_inside_a_stock_replica_is_an_error(run_threads):
    model = Escapes()
    replicas = replicas_of_a_stock_data_parallel(model, 2)
    for outcome in run_threads(lambda rank: replicas[rank](torch.randn(2, 3)), 2):
        with pytest.raises(RuntimeError, match="expected a replica to call its own copy of 'bn1'"):
            raise outcome
    assert model.bn.num_batches_tracked == 0


def test_a_thread_that_runs_no_replica_may_call_any_layer(run_threads):
    model = Escapes()
    replicas = replicas_of_a_stock_data_parallel(model, 2)
    (y,) = run_threads(lambda rank: model(torch.randn(2, 3)), 1)
    assert y.shape == (2, 3)
    assert len(replicas) == 2


def test_a_stock_replica_may_call_another_layer_in_evaluation_mode(run_threads):
    model = Escapes().eval()
    replicas = replicas_of_a_stock_data_parallel(model, 2)
    outputs = run_threads(lambda rank: replicas[rank](torch.randn(2, 3)), 2)
    assert all(y.shape == (2, 3) for y in outputs)
