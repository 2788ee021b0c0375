"""A compiled model over processes trains as torch's own layers do on the whole batch, in one graph."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn_convert import convert_model
from syncbn_core import THIS_PROCESS

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def net(**options):
    """Build a net of (N, 3, 6, 6) to (N, 5), the same one each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.BatchNorm1d(5, affine=False),
    ).double()


def train(world, backend, dynamic, all_sizes):
    model, twin = convert_model(net()), net()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for step, sizes in enumerate(all_sizes):
        torch.manual_seed(step)
        whole = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64)
        world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, sizes, **EXACT)


TWO = [[6, 6], [1, 5], [0, 4], [4, 3], [2, 0]]
FOUR = [[3, 2, 4, 3], [1, 0, 0, 2], [3, 2, 4, 3]]


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        pytest.param("eager", False, marks=pytest.mark.full),
        pytest.param("aot_eager", False, marks=pytest.mark.full),
        ("aot_eager", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("all_sizes", [TWO, pytest.param(FOUR, marks=pytest.mark.full)], ids=["two", "four"])
def test_every_step_is_that_of_the_whole_batch(all_sizes, dynamic, backend, workers):
    workers(len(all_sizes[0])).run(train, backend, dynamic, all_sizes)


def layer_of(options):
    """Build the layer of a case after a convolution; `stop` switches its running statistics off."""
    torch.manual_seed(0)
    build = {
        key: options[key] for key in options.keys() & {"eps", "momentum", "affine", "track_running_stats"}
    }
    convert = {key: options[key] for key in options.keys() & {"eps_mode"}}
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **build))
    if "eps_mode" in options:
        with torch.no_grad():
            model[0].weight[0] /= 100  # a channel whose variance is below the eps of the case
    converted = convert_model(copy.deepcopy(model), **convert)
    # On the whole batch, by plain operations, which have tests of their own.
    alone = {"eps_mode": "clamp"} if convert else {}
    twin = convert_model(copy.deepcopy(model), fused=False, process_group=THIS_PROCESS, **alone)
    for each in (converted, twin):
        if options.get("bias") is False:
            each[1].bias = None
        if options.get("stop"):
            each[1].track_running_stats = False
    return converted.to(options.get("dtype", torch.float64)), twin.double()


CASES = {
    "clamp": {"eps_mode": "clamp", "eps": 1e-2},
    "clamp if synchronized": {"eps_mode": "clamp_synchronized", "eps": 1e-2},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "statistics stopped": {"stop": True},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
}


def train_layer(world, name):
    options = CASES[name]
    model, twin = layer_of(options)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}.get(options.get("dtype"), 1e-10)
    for step in range(2):
        torch.manual_seed(step)
        whole = torch.randn(7, 3, 2, 2, dtype=options.get("dtype", torch.float64)).double()
        world.assert_compiled_equals_whole_batch(
            compiled, model, twin, whole, [4, 3], dtype=options.get("dtype"), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("name", CASES)
def test_every_option_of_a_layer_holds(name, workers):
    workers(2).run(train_layer, name)


def train_with_autocast(world, dtype):
    model = convert_model(net().float())
    eager = copy.deepcopy(model)
    whole = torch.randn(7, 3, 6, 6)
    results = []
    for called, module in (
        (torch.compile(model, backend="aot_eager", fullgraph=True), model),
        (eager, eager),
    ):
        x = world.share(whole, [4, 3]).clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = called(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    ours, theirs = results
    assert ours[0].dtype == theirs[0].dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_under_autocast_are_as_without_the_compiler(dtype, workers):
    workers(2).run(train_with_autocast, dtype)


def train_far_from_zero(world):
    model = convert_model(nn.BatchNorm2d(3))
    twin = nn.BatchNorm2d(3).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole = (torch.randn(8, 3, 4, 4) + 1e4).double()
    world.assert_compiled_equals_whole_batch(
        compiled, model, twin, whole, [5, 3], dtype=torch.float32, rtol=1e-4, atol=1e-4
    )


def test_a_mean_far_from_zero_costs_no_digits(workers):
    workers(2).run(train_far_from_zero)


def train_in_pairs(world):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model, twin = convert_model(net(), process_group=pairs[world.rank // 2]), net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(world.rank // 2)
    whole = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    mine = whole.split([3, 2])[world.rank % 2]
    torch.testing.assert_close(compiled(mine), twin(whole).split([3, 2])[world.rank % 2], **EXACT)
    torch.testing.assert_close(list(model.buffers()), list(twin.buffers()), **EXACT)
    others = convert_model(net(), process_group=pairs[1 - world.rank // 2])
    with pytest.raises(Exception, match="expected a process_group that this process is in"):
        torch.compile(others, backend="eager")(mine)


@pytest.mark.full
def test_sub_groups_normalize_separately(workers):
    workers(4).run(train_in_pairs)


def train_this_process(world):
    model, twin = convert_model(net(), process_group=THIS_PROCESS), net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4 + world.rank, 3, 6, 6, dtype=torch.float64) + world.rank
    torch.testing.assert_close(compiled(x), twin(x), **EXACT)
    torch.testing.assert_close(list(model.buffers()), list(twin.buffers()), **EXACT)


def test_this_process_synchronizes_with_no_other(workers):
    workers(2).run(train_this_process)


def export_in_training(world, strict):
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(Exception, match=r"expected torch.export of '1' in training mode without other"):
        torch.export.export(convert_model(net()), (x,), strict=strict)
    alone = convert_model(net(), process_group=THIS_PROCESS)
    program = torch.export.export(alone, (x,), strict=strict).module()
    torch.testing.assert_close(program(x), net()(x), **EXACT)
    program = torch.export.export(convert_model(net()).eval(), (x,), strict=strict).module()
    torch.testing.assert_close(program(x), net().eval()(x), **EXACT)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_export_in_training_over_processes_is_an_error_that_says_what_to_do(strict, workers):
    workers(2).run(export_in_training, strict)


def evaluate(world):
    model, twin = convert_model(net()).eval(), net().eval()
    x = torch.randn(2 + world.rank, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), twin(x), **EXACT)


def test_evaluation_does_not_communicate(workers):
    workers(2).run(evaluate)


def without_values(world):
    layer = convert_model(nn.BatchNorm2d(3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 3, 2, 2, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    torch.testing.assert_close(layer.state_dict(), before)


def test_empty_batches_in_all_processes_update_nothing(workers):
    workers(2).run(without_values)


def one_value(world, backend):
    layer = convert_model(nn.BatchNorm1d(3))
    x = torch.randn(1 - world.rank, 3)  # one in process 0, none in process 1
    with pytest.raises(
        RuntimeError, match=r"Expected more than 1 value per channel.*'SynchronizedBatchNorm1d'"
    ):
        torch.compile(layer, backend=backend, fullgraph=True)(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_value_in_all_processes_together_is_an_error(backend, workers):
    workers(2).run(one_value, backend)


def become_a_process_group(world):
    """Compile while there is no process group, and go on with one."""
    group, dist.group.WORLD = dist.group.WORLD, None
    try:
        model, twin = convert_model(net()), net()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        alone = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(compiled(alone), twin(alone), **EXACT)
    finally:
        dist.group.WORLD = group
    whole = torch.randn(7, 3, 6, 6, dtype=torch.float64)
    world.assert_compiled_equals_whole_batch(compiled, model, twin, whole, [4, 3], **EXACT)


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="what is compiled again there loses its gradients")
def test_a_model_compiled_before_there_were_processes_synchronizes_afterwards(workers):
    workers(2).run(become_a_process_group)
