"""The loops that people train by, with compiled models: as without the compiler."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn_convert import convert_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [4, 3]


def net():
    """Build a net of (N, 3, 6, 6) to (N, 4), the same one each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.BatchNorm1d(4)),
    ).double()


def batch(step):
    return torch.randn(
        sum(SIZES), 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
    )


def wrapped(model, how):
    """Return what is called, and a list of the graphs that are compiled for it."""
    graphs = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    if how == "DDP around compiled":
        called = DistributedDataParallel(torch.compile(model, backend=backend, fullgraph=True))
    elif how == "compiled around DDP":
        called = torch.compile(DistributedDataParallel(model), backend=backend)
    else:
        called = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1e-3), backend=backend)
    return called, graphs


def train_with_ddp(world, how):
    model, twin = convert_model(net()), net()
    # Before it splits a graph at every bucket, DDP's optimizer wants the first one to be no larger.
    first = 64 if how == WAYS[2] else torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
    with mock.patch.object(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", first):
        called, graphs = wrapped(model, how)
        for step in range(3):
            world.assert_equals_whole_batch(called, model, twin, batch(step), SIZES, averaged=True, **EXACT)
    return len(graphs)


WAYS = ["DDP around compiled", "compiled around DDP", "compiled around DDP with many buckets"]


@pytest.mark.parametrize("how", [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.full), WAYS[2]])
def test_ddp(how, workers):
    graphs = workers(2).run(train_with_ddp, how)
    # Torch itself breaks the graph in the forward of DDP.
    assert graphs == [1, 1] or how != WAYS[0]


def accumulate(world, how):
    model, twin = convert_model(net()), net()
    called, _ = wrapped(model, how)
    ddp = called if hasattr(called, "no_sync") else called._orig_mod
    for step in range(4):
        whole = batch(step)
        share = world.share(whole, SIZES)
        weights = torch.linspace(-1, 1, 4, dtype=torch.float64) * (1 + step)
        if step % 2 == 0:
            with ddp.no_sync():
                (called(share) * weights).sum().backward()
        else:
            (called(share) * weights).sum().backward()
        (twin(whole) * weights).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad * world.size, theirs.grad, **EXACT)


@pytest.mark.parametrize("how", [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.full)])
def test_gradients_accumulate_without_ddps_exchange(how, workers):
    workers(2).run(accumulate, how)


def train_in_blocks(world):
    """Compile every block by itself; half of them are recomputed in the backward."""
    model, twin = convert_model(net()), net()
    blocks = [torch.compile(block, backend="aot_eager", fullgraph=True) for block in model]

    def call(x):
        for number, block in enumerate(blocks):
            x = checkpoint(block, x, use_reentrant=False) if number == 1 else block(x)
        return x

    for step in range(2):
        whole = batch(step)
        x, y = world.share(whole, SIZES), twin(whole)
        weights = torch.linspace(-1, 1, 4 * sum(SIZES), dtype=torch.float64).view(-1, 4)
        model.zero_grad(), twin.zero_grad()
        (call(x) * world.share(weights, SIZES)).sum().backward()
        (y * weights).sum().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(world.total(ours.grad), theirs.grad, **EXACT)


def test_blocks_that_are_compiled_one_by_one_and_recomputed(workers):
    workers(2).run(train_in_blocks)


def adversaries():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    critic = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    return generator.double(), critic.double()


def adversarial_steps(generator, critic, parameters, images, noise, mean):
    """Train a generator and a critic in turns; return the gradients of both."""
    of_critic = (critic(images).tanh() - critic(generator(noise).detach()).tanh()) * mean
    gradients = list(torch.autograd.grad(of_critic.sum(), parameters[1]))
    of_generator = critic(generator(noise)).tanh() * mean
    return gradients + list(torch.autograd.grad(of_generator.sum(), parameters[0]))


def train_adversaries(world):
    ours = [convert_model(each) for each in adversaries()]
    theirs = adversaries()
    compiled = [torch.compile(each, backend="aot_eager", fullgraph=True) for each in ours]
    for step in range(2):
        torch.manual_seed(step)
        images = torch.randn(7, 3, 2, 2, dtype=torch.float64)
        noise = torch.randn(7, 2, 2, 2, dtype=torch.float64)
        weights = torch.randn(7, 1, 2, 2, dtype=torch.float64)
        parameters = [list(each.parameters()) for each in ours]
        shares = [world.share(each, SIZES) for each in (images, noise, weights)]
        gradients = adversarial_steps(*compiled, parameters, *shares)
        parameters = [list(each.parameters()) for each in theirs]
        expected = adversarial_steps(*theirs, parameters, images, noise, weights)
        for mine, whole in zip(gradients, expected, strict=True):
            torch.testing.assert_close(world.total(mine), whole, **EXACT)
        for mine, whole in zip(ours, theirs, strict=True):
            torch.testing.assert_close(list(mine.buffers()), list(whole.buffers()), **EXACT)


def test_a_generator_and_a_critic_in_turns(workers):
    workers(2).run(train_adversaries)


def train_unused(world):
    """Leave one of two outputs out of the loss, another one in each process."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.heads = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            return [head(x.relu()) for head in self.heads]

    twin, model = Two().double(), Two().double()
    model.load_state_dict(twin.state_dict())
    model = convert_model(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    weights = torch.randn(7, 4, 2, 2, dtype=torch.float64)
    (compiled(world.share(whole, SIZES))[world.rank] * world.share(weights, SIZES)).sum().backward()
    outputs = twin(whole)
    parts = [(outputs[rank].split(SIZES)[rank] * weights.split(SIZES)[rank]).sum() for rank in range(2)]
    sum(parts).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(world.total(ours.grad), theirs.grad, **EXACT)


def test_nobody_waits_for_an_output_that_only_some_processes_use(workers):
    workers(2).run(train_unused)
