"""The loops that people train by, with compiled models: as without the compiler."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
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
            world.assert_compiled_equals_whole_batch(
                called, model, twin, batch(step), SIZES, averaged=True, **EXACT
            )
    return len(graphs)


WAYS = ["DDP around compiled", "compiled around DDP", "compiled around DDP with many buckets"]


@pytest.mark.parametrize("how", [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.full), WAYS[2]])
def test_ddp(how, workers):
    graphs = workers(2).run(train_with_ddp, how)
    # Torch itself breaks the graph in the forward of DDP.
    assert graphs == [1, 1] or how != WAYS[0]


CHANGING = [[4, 3], [4, 2], [4, 1], [4, 0]]  # so process 1 compiles again, and process 0 does not


def accumulate(world, how):
    model, twin = convert_model(net()), net()
    called, _ = wrapped(model, how)
    ddp = called if hasattr(called, "no_sync") else called._orig_mod
    for step, sizes in enumerate(CHANGING):
        whole = batch(step)[: sum(sizes)]
        share = world.share(whole, sizes)
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


def small_net():
    """Build a net of (N, 3, 2, 2) to (N, 3, 2, 2), the same one each time."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    return nn.Sequential(*layers).double()


def small_batch(seed, size=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 2, 2, dtype=torch.float64, generator=generator)


def go_through_phases(world):
    """Train, evaluate, look on without gradients, freeze and thaw, by one compiled model."""
    model, twin = convert_model(small_net()), small_net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def train(seed):
        world.assert_compiled_equals_whole_batch(compiled, model, twin, small_batch(seed), SIZES, **EXACT)

    for seed in range(2):
        train(seed)
        model.eval(), twin.eval()
        for size in range(1, 3 + world.rank):  # more batches in process 1
            x = small_batch(seed, size)
            torch.testing.assert_close(compiled(x), twin(x), **EXACT)
        model.train(), twin.train()
        with torch.no_grad():
            x = small_batch(seed + 10)
            torch.testing.assert_close(compiled(world.share(x, SIZES)), world.share(twin(x), SIZES), **EXACT)
    torch.testing.assert_close(list(model.buffers()), list(twin.buffers()), **EXACT)
    for parameter in (*model[:2].parameters(), *twin[:2].parameters()):
        parameter.requires_grad_(False)
    x, weights = small_batch(20), small_batch(21)
    twin.zero_grad(), model.zero_grad()
    (compiled(world.share(x, SIZES)) * world.share(weights, SIZES)).sum().backward()
    (twin(x) * weights).sum().backward()
    assert model[0].weight.grad is None
    for ours, theirs in zip(model[3:].parameters(), twin[3:].parameters(), strict=True):
        torch.testing.assert_close(world.total(ours.grad), theirs.grad, **EXACT)
    for parameter in (*model[:2].parameters(), *twin[:2].parameters()):
        parameter.requires_grad_(True)
    train(30)


def test_training_evaluation_no_grad_and_frozen_layers_in_turns(workers):
    workers(2).run(go_through_phases)


def train_by_a_compiled_step(world):
    """Compile the whole step: forward, backward and the optimizer."""
    model, twin = convert_model(small_net()), small_net()
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, twin))
    weights = small_batch(1)

    @torch.compile(backend="aot_eager")
    def step(x, weights):
        ours.zero_grad()
        (model(x) * weights).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        ours.step()

    for seed in range(3):
        whole = small_batch(seed)
        step(world.share(whole, SIZES), world.share(weights, SIZES))
        theirs.zero_grad()
        (twin(whole) * weights).sum().backward()
        theirs.step()
    torch.testing.assert_close(model.state_dict(), dict(twin.state_dict()), **EXACT)


def test_a_compiled_function_of_the_whole_step(workers):
    workers(2).run(train_by_a_compiled_step)


def copy_what_is_compiled(world):
    model, twin = convert_model(small_net()), small_net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    world.assert_compiled_equals_whole_batch(compiled, model, twin, small_batch(0), SIZES, **EXACT)
    other, other_twin = copy.deepcopy(compiled), copy.deepcopy(twin)
    for seed in range(2):  # the original has moved on
        world.assert_compiled_equals_whole_batch(compiled, model, twin, small_batch(seed), SIZES, **EXACT)
    world.assert_compiled_equals_whole_batch(
        other, other._orig_mod, other_twin, small_batch(9), SIZES, **EXACT
    )


def test_a_deep_copy_of_a_compiled_model_is_a_model_of_its_own(workers):
    workers(2).run(copy_what_is_compiled)


def differentiate_twice_over(world):
    """Two backwards of one forward, which retain the graph."""
    model, twin = convert_model(small_net()), small_net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole = small_batch(0)
    y, expected = compiled(world.share(whole, SIZES)), twin(whole)
    for seed in range(1, 3):
        weights = small_batch(seed)
        (y * world.share(weights, SIZES)).sum().backward(retain_graph=True)
        (expected * weights).sum().backward(retain_graph=True)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(world.total(ours.grad), theirs.grad, **EXACT)


def test_two_backwards_of_one_forward(workers):
    workers(2).run(differentiate_twice_over)


def fail_in_the_middle(world):
    """Process 1 fails between two compiled parts, and goes on with its next batch."""
    parts = nn.ModuleDict({name: nn.Sequential(nn.BatchNorm2d(3)) for name in ("stem", "head")})
    stem, head = (torch.compile(part, backend="aot_eager") for part in convert_model(parts).values())
    x = stem(torch.randn(2, 3, 2, 2))
    try:
        if world.rank == 1:
            raise OSError("no such image")
        head(x)
    except OSError:
        stem(torch.randn(2, 3, 2, 2))


def test_a_failed_step_is_an_error_in_the_next_one(workers):
    for rank, outcome in enumerate(workers(2).outcomes(fail_in_the_middle)):
        name = ("head.0", "stem.0")[rank]
        assert f"expected all processes in the forward of '{name}', got another process" in outcome["error"]


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
    moves = [layer.num_batches_tracked.item() for layer in model.modules() if hasattr(layer, "momentum")]
    assert moves == [2, 4, 2]  # of the recomputed block twice a step, as those of torch's own layers


def test_blocks_that_are_compiled_one_by_one_and_recomputed(workers):
    workers(2).run(train_in_blocks)


def train_many_blocks(world, limit):
    """Compile ten blocks of one class one by one; return how many graphs that makes."""
    torch.manual_seed(0)
    twin = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()) for _ in range(10))).double()
    model = convert_model(copy.deepcopy(twin))
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    for block in model:
        block.compile(backend=backend)
    with torch._dynamo.config.patch(recompile_limit=limit):
        world.assert_compiled_equals_whole_batch(model, model, twin, small_batch(0), SIZES, **EXACT)
    return len(graphs)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "recompile_limit"), reason="has another name there")
@pytest.mark.parametrize(("limit", "compiled"), [(8, 8), (10, 10)], ids=["default", "raised"])
def test_many_blocks_that_are_compiled_one_by_one(limit, compiled, workers):
    assert workers(2).run(train_many_blocks, limit) == [compiled] * 2


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
