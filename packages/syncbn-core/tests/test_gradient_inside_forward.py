"""A gradient inside a replica's forward is an error: the loss of the other replicas does not exist yet."""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm1d

pytestmark = pytest.mark.usefixtures("graph_kind")

MESSAGE = (
    r"expected the backward of '.*' after the forward of all replicas, got one inside a replica's forward"
)


class Forces(nn.Module):
    """The gradient of an energy with respect to the input, as in models of molecules."""

    def __init__(self, norm, retain_graph):
        super().__init__()
        self.retain_graph = retain_graph
        self.energy = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, retain_graph=self.retain_graph)[0]


def chunks():
    return [torch.randn(size, 3, dtype=torch.float64) for size in (2, 1, 3)]


@pytest.mark.pairwise
@pytest.mark.parametrize("retain_graph", [True, False], ids=["retained", "freed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("culprits", [[0], [2], [0, 1, 2]], ids=str)
def test_it_is_an_error_in_every_replica(culprits, fused, retain_graph, replicas_of):
    model = Forces(SynchronizedBatchNorm1d(4, fused=fused), retain_graph)
    inputs = chunks()

    def forward(replica, rank):
        return replica(inputs[rank]) if rank in culprits else replica.energy(inputs[rank])

    with pytest.raises(RuntimeError, match=MESSAGE):
        replicas_of(model, 3).run(forward)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gradient_of_a_parameter_of_the_layer_alone_is_an_error_too(name, fused, replicas_of):
    layer = SynchronizedBatchNorm1d(3, fused=fused).double()

    def forward(replica, rank):
        return torch.autograd.grad(replica(chunks()[rank]).square().sum(), getattr(layer, name))

    with pytest.raises(RuntimeError, match=MESSAGE):
        replicas_of(layer, 3).run(forward)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_a_gradient_of_what_comes_behind_the_layer_is_allowed(fused, replicas_of):
    layer = SynchronizedBatchNorm1d(3, fused=fused).double()

    def forward(replica, rank):
        y = replica(chunks()[rank])
        return torch.autograd.grad(y.square().sum(), y)[0] - 2 * y

    for difference in replicas_of(layer, 3).run(forward):
        assert not difference.any()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_it_is_an_error_in_the_threads_of_a_stock_data_parallel(fused, run_threads):
    layer = SynchronizedBatchNorm1d(3, fused=fused).double()
    replicas = [layer._replicate_for_data_parallel() for _ in range(2)]
    for rank, replica in enumerate(replicas):
        replica._parameters = dict(layer._parameters)
        replica._buffers = {k: b.clone() if rank else b for k, b in layer._buffers.items()}

    def work(rank):
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(replicas[rank](x).sum(), x, retain_graph=True)

    for outcome in run_threads(work, 2):
        with pytest.raises(RuntimeError, match=MESSAGE):
            raise outcome


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_a_gradient_after_the_forward_is_that_of_the_whole_batch(fused, replicas_of, stock_twin):
    model = Forces(SynchronizedBatchNorm1d(4, fused=fused), False)
    inputs = [x.requires_grad_() for x in chunks()]
    outputs = replicas_of(model.energy, 3).run(lambda replica, rank: replica(inputs[rank]))
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), inputs)
    model.energy[1] = stock_twin(model.energy[1], 2)
    torch.testing.assert_close(torch.cat(gradients), model(torch.cat(inputs)), rtol=1e-10, atol=1e-12)


def test_a_gradient_through_a_layer_in_evaluation_mode_is_allowed(replicas_of):
    model = Forces(SynchronizedBatchNorm1d(4), False).eval()
    inputs = chunks()
    outputs = replicas_of(model, 3).run(lambda replica, rank: replica(inputs[rank]))
    torch.testing.assert_close(torch.cat(outputs), model(torch.cat(inputs)), rtol=1e-10, atol=1e-12)


def test_a_gradient_that_does_not_reach_the_layer_is_allowed(replicas_of):
    model = nn.ModuleList([nn.Linear(3, 3), SynchronizedBatchNorm1d(3)]).double()
    inputs = chunks()

    def forward(replica, rank):
        x = inputs[rank].clone().requires_grad_()
        (slope,) = torch.autograd.grad(replica[0](x).sum(), x)
        return replica[1](x) * slope

    replicas_of(model, 3).run(forward)
    assert model[1].num_batches_tracked == 1
