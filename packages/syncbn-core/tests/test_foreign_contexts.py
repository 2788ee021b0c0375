"""Replication callbacks of vendored folders: contexts without a group, and replicas made one by one."""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm1d

pytestmark = pytest.mark.usefixtures("graph_kind")


class Context:
    """Vendored: ``class CallbackContext(object): pass``."""


def replicate_one_by_one(model, count):
    """Make whole replicas, one after the other; torch makes them module by module."""
    replicas = []
    for rank in range(count):
        copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, copy in copies.items():
            copy._modules = {name: copies[child] for name, child in module._modules.items()}
            copy._parameters = dict(module._parameters)
            copy._buffers = {k: b.clone() if rank else b for k, b in module._buffers.items()}
        replicas.append(copies[model])
    return replicas


def execute_callbacks(replicas):
    """Give the replicas of each layer one context, as the vendored loop does, the master first."""
    contexts = [Context() for _ in replicas[0].modules()]
    for rank, replica in enumerate(replicas):
        for context, module in zip(contexts, replica.modules()):
            if hasattr(module, "__data_parallel_replicate__"):
                module.__data_parallel_replicate__(context, rank)
    return contexts


def make_model():
    return nn.Sequential(SynchronizedBatchNorm1d(3), nn.Tanh(), SynchronizedBatchNorm1d(3)).double()


@pytest.mark.parametrize("sizes", [[2, 1, 4], [3, 2], [4]], ids=str)
def test_replicas_with_one_context_per_layer_are_one_batch(sizes, run_threads, train_step, stock_twin):
    model = make_model()
    twin = nn.Sequential(stock_twin(model[0], 2), nn.Tanh(), stock_twin(model[2], 2))

    def forward(model, inputs):
        replicas = replicate_one_by_one(model, len(inputs))
        execute_callbacks(replicas)
        return run_threads(lambda rank: replicas[rank](inputs[rank]), len(inputs))

    for _ in range(3):
        chunks = [torch.randn(size, 3, dtype=torch.float64) for size in sizes]
        ours = train_step(model, chunks, forward)
        theirs = train_step(twin, chunks, lambda twin, inputs: [twin(torch.cat(list(inputs)))])
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_forward_with_fewer_replicas_and_the_same_contexts_is_a_forward_of_its_own(run_threads):
    model = make_model()[:1]
    replicas = replicate_one_by_one(model, 3)
    contexts = [Context() for _ in replicas[0].modules()]
    for count in (3, 2, 3):
        for rank, replica in enumerate(replicas[:count]):
            replica[0].__data_parallel_replicate__(contexts[1], rank)
        inputs = [torch.randn(2, 3, dtype=torch.float64) for _ in range(count)]
        outputs = torch.cat(run_threads(lambda rank, x=inputs: replicas[rank](x[rank]), count))
        expected = nn.BatchNorm1d(3).double()(torch.cat(inputs))
        torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-12)
