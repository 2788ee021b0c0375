"""How often processes communicate: once in a forward, once in a backward, and all of them or none."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn_core import SynchronizedBatchNorm2d

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def weighted_sum(y):
    return (y * torch.randn_like(y)).sum()


def count(world, options):
    layer = SynchronizedBatchNorm2d(4, **options)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with world.counted() as forward:
        y = layer(x)
    with world.counted() as backward:
        weighted_sum(y).backward()
    return forward.total(), backward.total()


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"fused": False}],
    ids=str,
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_there_is_one_collective_in_forward_and_one_in_backward(world_size, options, processes):
    assert processes(world_size).run(count, options) == [(1, 1)] * world_size


def count_in_evaluation(world):
    layer = SynchronizedBatchNorm2d(4).eval()
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with world.counted() as calls:
        weighted_sum(layer(x)).backward()
    assert not calls, calls


def test_a_frozen_layer_does_not_communicate(processes):
    processes(2).run(count_in_evaluation)


def train_with_one_gradient(world, fused, affine):
    whole = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    twin = nn.BatchNorm2d(4, affine=affine, dtype=torch.float64)
    layer = SynchronizedBatchNorm2d(4, affine=affine, fused=fused, dtype=torch.float64)
    ours = world.share(whole).clone().requires_grad_(world.rank == 1)
    whole.requires_grad_()
    weights = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    with world.counted() as calls:
        (layer(ours) * world.share(weights)).sum().backward()
    assert calls.total() == 2, calls
    (twin(whole) * weights).sum().backward()
    if world.rank == 1:
        torch.testing.assert_close(ours.grad, world.share(whole.grad), **EXACT)
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    torch.testing.assert_close(world.total_gradients(layer), gradients, **EXACT)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
def test_a_process_whose_input_needs_no_gradient_takes_part_in_the_backward(fused, affine, processes):
    processes(2).run(train_with_one_gradient, fused, affine)


def ignore_a_branch_in_one_process(world):
    def build(norm):
        torch.manual_seed(0)
        return nn.ModuleList([norm(3), norm(3), norm(3)]).double()

    def forward(net, x):
        stem, branch, head = net
        h = stem(x)
        return branch(h), head(h)  # the branch comes between the other two

    whole, weights = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    layers, twin = build(SynchronizedBatchNorm2d), build(nn.BatchNorm2d)
    ours = world.share(whole).clone().requires_grad_()
    from_branch, from_head = forward(layers, ours)
    loss = (from_head * world.share(weights)).sum()
    if world.rank == 1:
        loss = loss + (from_branch * world.share(weights)).pow(3).sum()
    loss.backward()

    whole.requires_grad_()
    from_branch, from_head = forward(twin, whole)
    of_second_process = slice(2, 4)
    loss = (from_head * weights).sum() + (from_branch * weights)[of_second_process].pow(3).sum()
    loss.backward()
    torch.testing.assert_close(ours.grad, world.share(whole.grad), **EXACT)


def test_a_layer_that_the_loss_of_one_process_ignores_takes_part_in_the_backward(processes):
    processes(2).run(ignore_a_branch_in_one_process)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def blocks(norm=SynchronizedBatchNorm2d):
    return [nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4)]


def train_with_checkpoints(world):
    plain = nn.Sequential(*blocks()).double()
    checkpointed = Checkpointed(*blocks()).double()
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64) + world.rank
    weights = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for model in map(DistributedDataParallel, (plain, checkpointed)):
        for _ in range(2):
            y = model(x)
            with world.counted() as calls:
                (y * weights).sum().backward()
            assert calls.total() == 2, calls  # DDP's own collectives are not functions of the module
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (checkpointed, plain)]
    torch.testing.assert_close(*gradients, **EXACT)
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict(), **EXACT)


def test_the_recomputation_of_a_checkpoint_does_not_communicate_or_update_statistics(processes):
    processes(2).run(train_with_checkpoints)


def accumulate(world):
    whole = torch.randn(2, 8, 3, 9, 9, dtype=torch.float64)  # two steps of a batch of 8
    weights = torch.randn(2, 8, 4, 5, 5, dtype=torch.float64)
    twin = nn.Sequential(*blocks(nn.BatchNorm2d)).double()
    model = nn.Sequential(*blocks()).double()
    twin.load_state_dict(model.state_dict())
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        (wrapped(world.share(whole[0])) * world.share(weights[0])).sum().backward()
    (wrapped(world.share(whole[1])) * world.share(weights[1])).sum().backward()
    for x, w in zip(whole, weights):
        (twin(x) * w).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad * world.size, theirs.grad, **EXACT)  # DDP's gradients are means
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), **EXACT)


def test_under_no_sync_gradients_accumulate_and_statistics_are_still_shared(processes):
    processes(2).run(accumulate)
