"""Ordinary training: several steps, uneven and empty shares, evaluation in between."""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm1d, SynchronizedBatchNorm2d

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def take_five_steps(world, affine):
    whole = torch.randn(8, 6, dtype=torch.float64)
    labels = torch.randint(3, (8,))
    torch.manual_seed(1)
    twin = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=affine), nn.Linear(5, 3)).double()
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 5), SynchronizedBatchNorm1d(5, affine=affine), nn.Linear(5, 3)
    ).double()
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, twin))
    for _ in range(5):
        ours.zero_grad()
        loss = nn.functional.cross_entropy(model(world.share(whole)), world.share(labels))
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = world.total(parameter.grad) / world.size
        ours.step()
        theirs.zero_grad()
        nn.functional.cross_entropy(twin(whole), labels).backward()
        theirs.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), **EXACT)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_after_five_steps_of_a_classifier_the_weights_are_those_of_the_whole_batch(
    world_size, affine, processes
):
    processes(world_size).run(take_five_steps, affine)


def train_on_one_row_each(world):
    whole = torch.randn(world.size, 2, dtype=torch.float64)
    layer, twin = SynchronizedBatchNorm1d(2, dtype=torch.float64), nn.BatchNorm1d(2, dtype=torch.float64)
    world.assert_equals_whole_batch(layer, twin, whole, **EXACT)


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_sample_in_every_process_is_enough(world_size, processes):
    processes(world_size).run(train_on_one_row_each)


def train_on_a_single_value(world):
    layer = SynchronizedBatchNorm1d(2)
    try:
        layer(torch.randn(int(world.rank == 1), 2))
    except ValueError as error:
        assert layer.num_batches_tracked == 0
        return str(error)


def test_one_value_per_channel_in_all_processes_is_torchs_own_error_in_each(processes):
    errors = processes(2).run(train_on_a_single_value)
    expected = "Expected more than 1 value per channel when training"
    assert [expected in str(error) for error in errors] == [True, True]


def train_on_nothing(world, fused):
    layer = SynchronizedBatchNorm2d(3, fused=fused)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.randn(0, 3, 2, 2, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)
    assert all(not p.grad.any() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_empty_batches_in_all_processes_give_empty_outputs_and_update_nothing(fused, processes):
    processes(2).run(train_on_nothing, fused)


def track_sizes_far_apart(world):
    layer, twin = SynchronizedBatchNorm2d(2, dtype=torch.float64), nn.BatchNorm1d(2, dtype=torch.float64)
    for _ in range(100):
        shares = [torch.randn(1, 2, 100, 100).double(), torch.randn(1, 2, 1, 1).double() * 2 + 300]
        layer(shares[world.rank])
        twin(torch.cat([share.flatten(2) for share in shares], dim=2))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), **EXACT)


def test_running_statistics_are_exact_if_shares_differ_ten_thousandfold(processes):
    processes(2).run(track_sizes_far_apart)


def train_with_batches_by_rank(world):
    sizes = [3 * rank + 1 for rank in range(world.size)]
    whole = torch.randn(sum(sizes), 3, 4, 5, dtype=torch.float64)
    layer, twin = SynchronizedBatchNorm2d(3, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
    for _ in range(3):
        world.assert_equals_whole_batch(layer, twin, whole, sizes, **EXACT)


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_exact_if_batch_sizes_differ(world_size, processes):
    processes(world_size).run(train_with_batches_by_rank)


def evaluate_on_one_process(world):
    layer = SynchronizedBatchNorm2d(3)
    layer(torch.randn(2, 3, 4, 4))
    if world.rank == 0:
        with world.counted() as calls:
            layer.eval()(torch.randn(2, 3, 4, 4))
        assert not calls, calls
    layer.train()(torch.randn(2, 3, 4, 4))


def test_one_process_may_evaluate_while_the_others_train(processes):
    processes(4).run(evaluate_on_one_process)


def repeat(world):
    """Return the bits of the results of a forward and backward that have to be equal in all processes."""
    layer = SynchronizedBatchNorm2d(16)
    x = torch.randn(4, 16, 5, 5)
    (layer(x + world.rank) * torch.randn(4, 16, 5, 5)).sum().backward()
    return layer.running_var.tolist(), layer.running_mean.tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_process_has_the_same_statistics_bit_for_bit(world_size, processes):
    first, *others = processes(world_size).run(repeat)
    assert all(other == first for other in others)
