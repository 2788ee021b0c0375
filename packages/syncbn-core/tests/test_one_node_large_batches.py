"""Large batches are not joined: every replica makes the passes over its own batch, in one node for all.

Tests of both large and small batches are in test_one_node.py.
"""

import threading

import pytest
import torch

from syncbn_core import SynchronizedBatchNorm1d
from syncbn_core._autograd import joined_node, one_node
from syncbn_core._kernels import cpu

ALL_LARGE = pytest.mark.parametrize("graph_kind", ["one node"], indirect=True)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
PARAMETERS = pytest.mark.parametrize("parameters", [{}, {"bias": False}, {"affine": False}], ids=str)


@pytest.fixture(autouse=True)
def _where_it_is_possible(graph_kind):
    """These tests are skipped if torch does not report whether saved tensors are intercepted."""


@LAYOUTS
@pytest.mark.parametrize("graph_kind", ["joined"], indirect=True)  # the limit that users have
def test_large_batches_are_not_joined(
    layout, layer_of, chunks_of, assert_equals_whole_batch, one_node_calls, joined_calls
):
    chunks = chunks_of(1, 2, spatial=(256, 260), layout=layout)
    assert all(chunk.numel() > joined_node.JOINED_UP_TO for chunk in chunks)
    assert_equals_whole_batch(layer_of(), chunks, rtol=1e-10, atol=1e-10)
    assert (one_node_calls, joined_calls) == ([2], [])


@ALL_LARGE
def test_every_replica_has_its_own_storages(
    form, layer_of, chunks_of, leaves_of, run_replicas, loss_of, one_node_calls
):
    inputs = leaves_of(chunks_of(2, 1, 3, spatial=form.spatial, layout=form.layout))
    outputs = run_replicas(layer_of(form.kind), inputs)
    gradients = torch.autograd.grad(loss_of(y**2 for y in outputs), inputs)
    assert one_node_calls == [3]
    storages = [tensor.untyped_storage() for tensor in (*inputs, *outputs, *gradients)]
    assert len({storage.data_ptr() for storage in storages}) == 9
    for x, *made in zip(inputs, outputs, gradients):
        assert [tensor.untyped_storage().nbytes() for tensor in made] == [x.untyped_storage().nbytes()] * 2


@pytest.mark.pairwise
@ALL_LARGE
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (3, 0, 0, 2)], ids=str)
def test_an_empty_batch_is_part_of_the_node_and_the_batch_is_counted_once(
    form, sizes, momentum, layer_of, chunks_of, check, one_node_calls
):
    layer = layer_of(form.kind, momentum=momentum)
    for number in (1, 2, 3):
        check(layer, chunks_of(*sizes, spatial=form.spatial, layout=form.layout))
        assert layer.num_batches_tracked == number
    assert one_node_calls == [len(sizes)] * 3


@ALL_LARGE
def test_every_replica_makes_its_passes_in_its_own_thread(layer_of, chunks_of, replicas_of, monkeypatch):
    chunks = chunks_of(2, 1, 3)
    calls = {name: [] for name in ("enter", "reduce", "leave")}

    def note(name, function):
        def spy(*arguments, **options):
            calls[name].append(threading.get_ident())
            return function(*arguments, **options)

        monkeypatch.setattr(one_node, name, spy)

    for name in calls:
        note(name, getattr(one_node, name))

    def forward(replica, rank):
        replica(chunks[rank])
        return threading.get_ident()

    threads = replicas_of(layer_of(), 3).run(forward)
    assert sorted(calls["enter"]) == sorted(calls["leave"]) == sorted(threads)
    assert calls["reduce"] == [threads[0]]


# Batches larger than a cache


@pytest.fixture
def passes(monkeypatch):
    """The number of samples of each pass."""
    samples = []
    affine = cpu.affine

    def spy(x, *rest, **options):
        samples.append(len(x))
        return affine(x, *rest, **options)

    monkeypatch.setattr(cpu, "affine", spy)
    return samples


def transposed(y):
    return y.transpose(2, 3).contiguous()


@pytest.mark.pairwise
@ALL_LARGE
@pytest.mark.parametrize("turned", [False, True], ids=["dy as x", "dy transposed"])
@PARAMETERS
@pytest.mark.parametrize(
    ("samples", "parts"),
    [(5, [1, 2, 5]), (4, [1, 2, 4, 1]), (2, [1, 2, 2, 2, 1]), (1, [1, *[1] * 2, *[1] * 5]), (0, [1] * 8)],
)
def test_a_backward_of_many_samples_goes_in_parts(
    samples, parts, parameters, turned, layer_of, chunks_of, check, monkeypatch, passes, one_node_calls
):
    # This many samples fit into a cache, with a few more numbers.
    monkeypatch.setattr(cpu, "_IN_CACHE", samples * 60 + samples % 2)
    behind = {"behind": lambda outputs: [transposed(y) for y in outputs]} if turned else {}
    check(layer_of(**parameters), chunks_of(5, 2, 1), **behind)
    assert one_node_calls == [3]
    assert sorted(passes[:3]) == [1, 2, 5]
    assert passes[3:] == parts  # the last replica first


@ALL_LARGE
def test_only_replicas_in_the_loss_need_parts(
    layer_of, chunks_of, check, monkeypatch, passes, one_node_calls
):
    monkeypatch.setattr(cpu, "_IN_CACHE", 120)
    check(layer_of(), chunks_of(5, 3, 4), behind=lambda outputs: [outputs[1]])
    assert one_node_calls == [3]
    assert passes[3:] == [4, 2, 1, 5]


@ALL_LARGE
def test_channels_last_need_no_parts(layer_of, chunks_of, check, monkeypatch, passes, one_node_calls):
    monkeypatch.setattr(cpu, "_IN_CACHE", 0)
    check(layer_of(), chunks_of(5, 2, 1, layout=torch.channels_last))
    assert one_node_calls == [3]
    assert passes[3:] == [1, 2, 5]


@ALL_LARGE
@pytest.mark.parametrize("first", [0.0, 100.0, 1e4], ids=lambda value: f"first sample at {value}")
@pytest.mark.parametrize("mean", [0.0, 9.0, 1e4], ids=lambda value: f"mean {value}")
def test_statistics_of_one_pass_have_the_digits_of_two(
    mean, first, layer_of, run_replicas, monkeypatch, one_node_calls
):
    monkeypatch.setattr(cpu, "_IN_CACHE", 0)
    layer = layer_of(SynchronizedBatchNorm1d, dtype=torch.float32, momentum=1.0)
    chunks = [torch.randn(size, 4) + mean for size in (5000, 3000)]
    for chunk in chunks:
        chunk[0] += first
    run_replicas(layer, chunks)
    assert one_node_calls == [2]
    batch = torch.cat(chunks).double()
    torch.testing.assert_close(layer.running_mean.double(), batch.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), batch.var(0), rtol=5e-5, atol=0)


# Which kernel


@pytest.fixture
def batch_norms(monkeypatch):
    """The number of samples in every call of torch's batch norm in evaluation mode."""
    samples = []
    batch_norm = cpu._forward_out

    def spy(x, *rest, **options):
        samples.append(len(x))
        return batch_norm(x, *rest, **options)

    monkeypatch.setattr(cpu, "_forward_out", spy)
    return samples


@pytest.mark.pairwise
@ALL_LARGE
@PARAMETERS
@LAYOUTS
@pytest.mark.parametrize("few", [59, 60, 119])
def test_large_channels_last_batches_use_another_kernel(
    few, layout, parameters, layer_of, chunks_of, check, monkeypatch, batch_norms, one_node_calls
):
    monkeypatch.setattr(cpu, "_FEW", few)
    check(layer_of(eps=0.3, **parameters), chunks_of(2, 1, layout=layout))
    assert one_node_calls == [2]
    few_ones = [size for size in (1, 2) if size * 60 <= few or layout is torch.contiguous_format]
    assert sorted(batch_norms) == sorted(few_ones * 2)  # in the forward and in the backward


@ALL_LARGE
def test_half_channels_last_batches_use_the_same_kernel_in_the_forward(
    layer_of, chunks_of, step, run_replicas, monkeypatch, batch_norms, one_node_calls
):
    monkeypatch.setattr(cpu, "_FEW", 0)
    chunks = chunks_of(2, 1, layout=torch.channels_last, dtype=torch.bfloat16)
    step(layer_of(dtype=torch.float32), chunks, run_replicas)
    assert one_node_calls == [2]
    assert sorted(batch_norms) == [1, 2]
