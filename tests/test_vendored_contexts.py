"""Our layers with the replication callbacks of a vendored folder, whose contexts have no group."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model


class Context:
    """An empty context, as in such a folder."""


def call_back(replicas):
    contexts = [Context() for _ in replicas[0].modules()]
    for copy_id, replica in enumerate(replicas):
        for context, module in zip(contexts, replica.modules(), strict=True):
            if hasattr(module, "__data_parallel_replicate__"):
                module.__data_parallel_replicate__(context, copy_id)


def replicate_one_by_one(model, count):
    replicas = []
    for copy_id in range(count):
        copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in copies.items():
            replica._modules = {name: copies[child] for name, child in module._modules.items()}
            replica._parameters = dict(module._parameters)
            buffers = module._buffers.items()
            replica._buffers = {name: b if copy_id == 0 else b.clone() for name, b in buffers}
        replicas.append(copies[model])
    return replicas


def run_in_threads(replicas, inputs):
    outputs = [None] * len(replicas)

    def run(rank):
        try:
            outputs[rank] = replicas[rank](inputs[rank])
        except Exception as error:
            outputs[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(replicas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a replica hangs"
    for output in outputs:
        if isinstance(output, Exception):
            raise output
    return outputs


@pytest.mark.parametrize("count", [2, 3])
def test_replicas_that_are_made_one_by_one_synchronize(count):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).double()
    whole, model = copy.deepcopy(net), convert_model(net)
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        replicas = replicate_one_by_one(model, count)
        call_back(replicas)
        y = torch.cat(run_in_threads(replicas, x.tensor_split(count)))
        torch.testing.assert_close(y, whole(x), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(model.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
