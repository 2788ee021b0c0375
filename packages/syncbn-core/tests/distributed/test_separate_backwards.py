"""Graphs that are differentiated separately stay separate: none keeps another one alive, in any process."""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm1d

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def block(norm, inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 5), norm(5), nn.ReLU(), nn.Linear(5, outputs), norm(outputs)
    ).double()


def noise(seed, width):
    return torch.randn(8, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(y, share, seed):
    return (y * share(noise(seed, y.shape[1]))).sum()


def train_adversaries(generator, discriminator, share):
    fake = generator(share(noise(1, 3)))
    judged = loss_of(discriminator(fake.detach()), share, 2)
    judged = judged + loss_of(discriminator(share(noise(3, 4))), share, 4)
    judged.backward()
    loss_of(discriminator(fake), share, 5).backward()


def train_on_two_batches_then_backward(first, second, share):
    losses = [loss_of(second(first(share(noise(seed, 3)))), share, seed + 10) for seed in (1, 2)]
    for loss in losses:
        loss.backward()


def train_on_two_batches_then_backward_in_reverse(first, second, share):
    losses = [loss_of(second(first(share(noise(seed, 3)))), share, seed + 10) for seed in (1, 2)]
    for loss in reversed(losses):
        loss.backward()


def train_on_two_batches_with_one_backward(first, second, share):
    sum(loss_of(second(first(share(noise(seed, 3)))), share, seed + 10) for seed in (1, 2)).backward()


def train_two_heads_on_features_without_gradient(first, second, share):
    with torch.no_grad():
        features = first(share(noise(1, 3)))
    losses = [loss_of(second(features + shift), share, shift) for shift in (2, 3)]
    for loss in losses:
        loss.backward()


def train_one_graph_twice(first, second, share):
    loss = loss_of(second(first(share(noise(1, 3)))), share, 2)
    loss.backward(retain_graph=True)
    loss.backward()


def train_from_the_middle(first, second, share):
    features = first(share(noise(1, 3)))
    (from_loss,) = torch.autograd.grad(loss_of(second(features), share, 2), features)
    features.backward(from_loss)


TRAININGS = {
    training.__name__: training
    for training in (
        train_adversaries,
        train_on_two_batches_then_backward,
        train_on_two_batches_then_backward_in_reverse,
        train_on_two_batches_with_one_backward,
        train_two_heads_on_features_without_gradient,
        train_one_graph_twice,
        train_from_the_middle,
    )
}


def compare_with_the_whole_batch(world, training):
    blocks = {}
    for norm, share in ((nn.BatchNorm1d, lambda whole: whole), (SynchronizedBatchNorm1d, world.share)):
        torch.manual_seed(0)
        blocks[norm] = nn.ModuleList([block(norm, 3, 4), block(norm, 4, 2)])
        TRAININGS[training](*blocks[norm], share)
    ours = world.total_gradients(blocks[SynchronizedBatchNorm1d])
    for name, parameter in blocks[nn.BatchNorm1d].named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours[name], expected, **EXACT)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_are_those_of_the_whole_batch(world_size, training, processes):
    processes(world_size).run(compare_with_the_whole_batch, training)
