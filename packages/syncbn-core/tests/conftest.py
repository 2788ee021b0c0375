"""Replicas on plain threads: all that these tests need of a data-parallel wrapper."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncbn_comm import ReplicaGroup

JOIN_SECONDS = 60.0


def replicate(layer: nn.Module, world_size: int) -> list[nn.Module]:
    """Replicas that share the layer's parameters; replica 0 has its buffers too, the others have copies."""
    replicas = []
    for rank in range(world_size):
        replica = layer._replicate_for_data_parallel()
        replica._parameters = dict(layer._parameters)
        if rank:
            replica._buffers = {k: None if b is None else b.clone() for k, b in layer._buffers.items()}
        replicas.append(replica)
    return replicas


class Replicas:
    """The replicas of one forward of one layer."""

    def __init__(self, layer: nn.Module, world_size: int, name: str = "layer1.bn1") -> None:
        self.modules = replicate(layer, world_size)
        self.group = ReplicaGroup(world_size, timeout=JOIN_SECONDS / 2)
        for rank, replica in enumerate(self.modules):
            replica.__data_parallel_replicate__(SimpleNamespace(name=name, group=self.group), rank)

    def run(self, forward: Callable[[nn.Module, int], Any]) -> list[Any]:
        """Call ``forward(replica, rank)`` in one thread for each replica; the first error is raised here."""
        results: list[Any] = [None] * len(self.modules)

        def work(rank: int, grad_enabled: bool) -> None:
            torch.set_grad_enabled(grad_enabled)
            try:
                with self.group.member(rank):
                    results[rank] = forward(self.modules[rank], rank)
            except BaseException as error:
                results[rank] = error

        threads = [
            threading.Thread(target=work, args=(rank, torch.is_grad_enabled()), daemon=True)
            for rank in range(len(self.modules))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_SECONDS)
        assert not any(thread.is_alive() for thread in threads)
        if self.group.failure is not None:
            raise self.group.failure
        return results


@pytest.fixture
def replicas_of() -> type[Replicas]:
    return Replicas


@pytest.fixture
def run_replicas() -> Callable[[nn.Module, Sequence[Tensor]], list[Tensor]]:
    def run(layer: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        return Replicas(layer, len(inputs)).run(lambda replica, rank: replica(inputs[rank]))

    return run
