"""The methods that forks override are called, as often and in the same thread as in vendored folders."""

import threading

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("graph_kind")

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])


@pytest.fixture
def chunks():
    return [torch.randn(size, 3, 4, 4) for size in (2, 1, 3)]


@FUSED
def test_the_master_callback_runs_once_per_call_in_the_thread_of_replica_0(fused, chunks, replicas_of):
    calls = []

    class Fork(SynchronizedBatchNorm2d):
        def _data_parallel_master(self, intermediates):
            calls.append((threading.get_ident(), [rank for rank, _ in intermediates]))
            return super()._data_parallel_master(intermediates)

    layer = Fork(3, fused=fused)

    def forward(replica, rank):
        replica(replica(chunks[rank]))
        return threading.get_ident()

    threads = replicas_of(layer, 3).run(forward)
    assert calls == [(threads[0], [0, 1, 2])] * 2
    assert layer.num_batches_tracked == 2


@FUSED
def test_the_master_callback_decides_what_a_replica_normalizes_with(fused, chunks, run_replicas):
    class Fork(SynchronizedBatchNorm2d):
        def _data_parallel_master(self, intermediates):
            results = super()._data_parallel_master(intermediates)
            return [
                (rank, torch.stack([torch.full((3,), float(rank)), torch.ones(3)])) for rank, _ in results
            ]

    for rank, y in enumerate(run_replicas(Fork(3, fused=fused), chunks)):
        torch.testing.assert_close(y, chunks[rank] - rank)


@FUSED
def test_compute_mean_std_gets_the_whole_batch_and_decides_the_result(fused, chunks, run_replicas):
    given = []

    class Fork(SynchronizedBatchNorm2d):
        def _compute_mean_std(self, mean, m2, count):
            given.append((mean.detach(), m2.detach(), count))
            return torch.zeros_like(mean), torch.full_like(mean, 2.0)

    layer = Fork(3, fused=fused)
    outputs = run_replicas(layer, chunks)
    batch = torch.cat(chunks).double()
    ((mean, m2, count),) = given
    torch.testing.assert_close(mean.double(), batch.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m2.double(), batch.var((0, 2, 3), correction=0) * 96, rtol=1e-5, atol=0)
    assert count == 96
    torch.testing.assert_close(outputs, [2 * chunk for chunk in chunks])
    # It also updates the running statistics, so they do not change in a fork that does not call it.
    assert layer.num_batches_tracked == 0


def test_a_replication_callback_of_a_fork_sees_every_replica_the_master_first(replicas_of):
    class Fork(SynchronizedBatchNorm2d):
        def __data_parallel_replicate__(self, ctx, copy_id):
            super().__data_parallel_replicate__(ctx, copy_id)
            seen.append((ctx.name, copy_id))

    seen = []
    replicas_of(nn.Sequential(Fork(3)), 3).run(lambda replica, rank: replica(torch.randn(2, 3, 4, 4)))
    assert seen == [("net.0", 0), ("net.0", 1), ("net.0", 2)]


def test_a_fork_that_ignores_the_callback_does_not_synchronize(replicas_of):
    class Fork(SynchronizedBatchNorm2d):
        def __data_parallel_replicate__(self, ctx, copy_id):
            self._place = None

    x = torch.randn(2, 3, 4, 4)
    replica = replicas_of(Fork(3), 2).modules[1]
    torch.testing.assert_close(replica(x), nn.BatchNorm2d(3)(x))


def test_resets_of_a_fork_are_called_by_torchs_constructor():
    called = []

    class Fork(SynchronizedBatchNorm2d):
        def reset_parameters(self):
            called.append("reset_parameters")
            super().reset_parameters()

        def reset_running_stats(self):
            called.append("reset_running_stats")
            super().reset_running_stats()

    Fork(3)
    assert called == ["reset_parameters", "reset_running_stats"]


def test_a_forward_of_a_fork_may_add_to_ours(chunks, run_replicas, replicas_of):
    class ConditionalBatchNorm(SynchronizedBatchNorm2d):
        def forward(self, input, gain):
            return super().forward(input) * gain

    outputs = replicas_of(ConditionalBatchNorm(3), 3).run(lambda replica, rank: replica(chunks[rank], 3.0))
    plain = run_replicas(SynchronizedBatchNorm2d(3), chunks)
    torch.testing.assert_close(outputs, [3 * y for y in plain])


class OldStyle(SynchronizedBatchNorm2d):
    """Keeps its running statistics by assignment in `_compute_mean_std`, as vendored folders do."""

    def __init__(self, num_features, fraction=0.9, **options):
        super().__init__(num_features, **options)
        self.fraction = fraction
        self.register_buffer("_tmp_running_mean", self.running_mean.clone())
        self.register_buffer("_running_iter", torch.ones(1))
        self.register_buffer("_last", None)
        self.batches = 0

    def _compute_mean_std(self, mean, m2, count):
        self._tmp_running_mean = self._tmp_running_mean * self.fraction + mean.detach()
        self._running_iter = self._running_iter * self.fraction + 1
        self.running_mean = self._tmp_running_mean / self._running_iter
        self._last = m2.detach() / (count - 1)
        self.batches += 1
        return mean, (m2 / count + self.eps) ** -0.5


@FUSED
def test_what_compute_mean_std_assigns_reaches_the_model(fused, chunks, run_replicas):
    layer = OldStyle(3, fused=fused)
    storage = layer.running_mean.data_ptr()
    mean, total, weight = torch.zeros(3), torch.zeros(3), 1.0
    for number in (1, 2, 3):
        batches = [chunk * number + number for chunk in chunks]
        run_replicas(layer, batches)
        whole = torch.cat(batches)
        total, weight = 0.9 * total + whole.mean((0, 2, 3)), 0.9 * weight + 1
        mean = total / weight
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer._running_iter, torch.tensor([weight]))
        torch.testing.assert_close(layer._last.float(), whole.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
        assert layer.batches == number
    assert layer.running_mean.data_ptr() == storage  # optimizers and averages may hold the buffer
    assert set(layer.state_dict()) >= {"running_mean", "_tmp_running_mean", "_running_iter", "_last"}
