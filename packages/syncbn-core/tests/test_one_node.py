"""One autograd node for all replicas, joined or not, equals torch's own layer on the whole batch."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from syncbn_core import SynchronizedBatchNorm, SynchronizedBatchNorm1d, SynchronizedBatchNorm2d

pytestmark = pytest.mark.parametrize("graph_kind", ["joined", "one node"], indirect=True)

C = 4
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
EXACTLY = {"rtol": 0, "atol": 0}
RANKS = pytest.mark.parametrize("rank", [0, 1, 2])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture(autouse=True)
def taken(graph_kind, one_node_calls):
    """The number of replicas that share a node, for each node that was made."""
    return one_node_calls


def dense(kind):
    """The arguments of `chunks_of` for a kind of input."""
    return {"spatial": kind.spatial, "layout": kind.layout}


@pytest.mark.pairwise
@pytest.mark.parametrize("sizes", [(2, 1, 3), (1, 4), (3, 1, 1, 2), (1,) * 8], ids=str)
def test_several_replicas_are_one_batch(form, sizes, layer_of, chunks_of, check, taken):
    check(layer_of(form.kind), chunks_of(*sizes, **dense(form)))
    assert taken == [len(sizes)]


@pytest.mark.pairwise
@pytest.mark.parametrize("parameters", [{}, {"bias": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "untracked"])
def test_every_option_holds_over_several_steps(
    parameters, momentum, track_running_stats, layer_of, chunks_of, check, taken
):
    layer = layer_of(momentum=momentum, track_running_stats=track_running_stats, eps=0.3, **parameters)
    for number in (1, 2, 3):
        check(layer, chunks_of(2, 1, 3))
        assert taken == [3] * number
        if track_running_stats:
            assert layer.num_batches_tracked == number


@pytest.mark.parametrize("momentum", [0, 1])
def test_a_momentum_may_be_a_whole_number(momentum, layer_of, chunks_of, check, taken):
    check(layer_of(momentum=momentum), chunks_of(2, 1))
    assert taken == [2]


def test_one_layer_may_run_twice_in_a_forward(layer_of, chunks_of, as_one_batch, check, taken):
    def twice(layer, x, rank):
        return layer(layer(x).tanh())

    def whole(twin, inputs):
        return as_one_batch(twin, [y.tanh() for y in as_one_batch(twin, inputs)])

    check(layer_of(), chunks_of(2, 3), twice, whole=whole)
    assert taken == [2, 2]


def test_two_layers_may_run_in_a_forward(
    layer_of, chunks_of, as_one_batch, stock_twin, step, run_replicas, taken
):
    model = nn.Sequential(layer_of(), nn.Tanh(), layer_of(affine=False, momentum=None))
    twin = nn.Sequential(
        *(module if index == 1 else stock_twin(module, 2) for index, module in enumerate(model))
    )

    def whole(twin, inputs):
        return as_one_batch(twin[2], [twin[1](y) for y in as_one_batch(twin[0], inputs)])

    for _ in range(2):
        chunks = chunks_of(2, 1, 3)
        torch.testing.assert_close(step(model, chunks, run_replicas), step(twin, chunks, whole), **TIGHT)
    assert taken == [3, 3] * 2


def test_everything_is_bitwise_repeatable(layer_of, chunks_of, step, run_replicas, taken):
    layer, chunks = layer_of(dtype=torch.float32), chunks_of(7, 4, 6, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    steps = []
    for _ in range(20):
        layer.load_state_dict(state)
        steps.append(step(layer, chunks, run_replicas))
    assert taken == [3] * 20
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], **EXACTLY)


# Layouts and dtypes


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_as_the_inputs_in_shape_dtype_and_layout(
    form, dtype, layer_of, chunks_of, leaves_of, run_replicas, loss_of, taken
):
    inputs = leaves_of(chunks_of(2, 3, 1, dtype=dtype, **dense(form)))
    layer = layer_of(form.kind, dtype=torch.float32 if dtype is torch.bfloat16 else dtype)
    outputs = run_replicas(layer, inputs)
    # From autograd itself, since the addition to a leaf's gradient corrects the layout.
    gradients = torch.autograd.grad(loss_of(y**2 for y in outputs[:2]), inputs)
    assert taken == [3]
    for x, y, dx in zip(inputs, outputs, gradients):
        assert x.shape == y.shape == dx.shape
        assert x.stride() == y.stride() == dx.stride()
        assert x.dtype == y.dtype == dx.dtype


def transposed(dy):
    axes = tuple(reversed(range(dy.dim())))
    return dy.permute(axes).contiguous().permute(axes)


GRADIENTS = {
    "contiguous": lambda dy: dy.contiguous(),
    "channels last": lambda dy: dy.contiguous(memory_format=torch.channels_last),
    "transposed": transposed,
    "every other": lambda dy: dy.repeat_interleave(2, -1)[..., ::2],
    "a slice of more channels": lambda dy: torch.cat([dy, dy], 1)[:, :C],
    "one number": lambda dy: dy[:1, :1, :1, :1].expand_as(dy),
}
ROUNDINGS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def against_float64(stock_twin, leaves_of, run_replicas):
    """The results of a forward and backward, and those of torch's own layer in float64 on the same data."""

    def run(layer, chunks, dys):
        twin = stock_twin(layer, 4).double()
        inputs = leaves_of(chunks)
        outputs = run_replicas(layer, inputs)
        *dxs, dweight, dbias = torch.autograd.grad(outputs, [*inputs, *layer.parameters()], dys)
        ours = {"y": torch.cat(outputs), "dx": torch.cat(dxs), "dweight": dweight, "dbias": dbias}

        batch = torch.cat([chunk.double() for chunk in chunks]).requires_grad_()
        y = twin(batch)
        wanted = [batch, *twin.parameters()]
        gradients = torch.autograd.grad(y, wanted, torch.cat([dy.double() for dy in dys]))
        expected = {"y": y, **dict(zip(["dx", "dweight", "dbias"], gradients))}
        return [
            {**of_one, "running_mean": model.running_mean, "running_var": model.running_var}
            for of_one, model in ((ours, layer), (expected, twin))
        ]

    return run


@pytest.mark.pairwise
@pytest.mark.parametrize("dy_layout", GRADIENTS)
@LAYOUTS
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_gradients_may_come_in_any_layout_and_every_dtype_has_its_digits(
    dtype, layout, dy_layout, layer_of, chunks_of, against_float64, taken
):
    layer = layer_of(dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    chunks = chunks_of(4, 1, 6, spatial=(16, 15), layout=layout, dtype=dtype)
    dys = [GRADIENTS[dy_layout](torch.randn(x.shape, dtype=dtype) + 1) for x in chunks]
    ours, expected = against_float64(layer, chunks, dys)
    assert taken == [3]
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    rounding = ROUNDINGS[dtype]
    for name in ("y", "dx"):
        torch.testing.assert_close(ours[name].double(), expected[name], rtol=rounding, atol=rounding)
    # Sums of 2640 numbers of order 1: torch's kernels add up to 2e-5, and a half on the way 1e-4 or more.
    tolerance = TIGHT if dtype is torch.float64 else {"rtol": 5e-5, "atol": 2e-3}
    for name in ("dweight", "dbias"):
        assert ours[name].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(ours[name].double(), expected[name], **tolerance)


# Inputs that cannot be joined


@RANKS
def test_other_spatial_sizes_in_one_replica(rank, layer_of, chunks_of, check, taken):
    chunks = chunks_of(2, 1, 3)
    (chunks[rank],) = chunks_of(2, spatial=(4, 2))
    check(layer_of(), chunks)
    assert taken == [3]


def test_inputs_of_several_numbers_of_axes(layer_of, chunks_of, check, taken):
    chunks = [*chunks_of(2, spatial=()), *chunks_of(3, spatial=(4,)), *chunks_of(1, spatial=(2, 3))]
    check(layer_of(SynchronizedBatchNorm), chunks)
    assert taken == [3]


@RANKS
def test_another_layout_in_one_replica(rank, layer_of, chunks_of, check, taken):
    chunks = chunks_of(2, 3, 2)
    chunks[rank] = chunks[rank].contiguous(memory_format=torch.channels_last)
    check(layer_of(), chunks)
    assert taken == [3]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("odd_one", ["layout", "spatial sizes"])
def test_replicas_whose_inputs_differ_count_once(odd_one, momentum, layer_of, chunks_of, check, taken):
    layer = layer_of(momentum=momentum)
    for number in (1, 2, 3):
        first, second = chunks_of(2, 3)
        if odd_one == "layout":
            second = second.contiguous(memory_format=torch.channels_last)
        else:
            second = second[..., :2].contiguous()
        check(layer, [first, second])
        assert layer.num_batches_tracked == number
    assert taken == [2, 2, 2]


# Means far from zero


@pytest.mark.pairwise
@LAYOUTS
@pytest.mark.parametrize("channels", [[0], [3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.01), (1e4, 1.0), (1e6, 1.0), (-1e6, 1.0)])
def test_a_mean_far_from_zero_in_any_channel_costs_the_variance_no_digits(
    mean, std, channels, layout, layer_of, run_replicas, taken
):
    layer = layer_of(momentum=1.0, dtype=torch.float32)
    batch = torch.randn(16, C, 28, 28, dtype=torch.float64) * std
    batch[:, channels] += mean
    batch = batch.float().contiguous(memory_format=layout)
    run_replicas(layer, [part.clone() for part in batch.split([5, 11])])
    assert taken == [2]
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_var.double(), batch.double().var((0, 2, 3)), rtol=1e-4, atol=0)
    expected = batch.double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-6, atol=1e-6 * std)


@LAYOUTS
@pytest.mark.parametrize("mean", [9.0, -9.0])
def test_a_mean_not_far_from_zero_costs_the_variance_no_digits(mean, layout, layer_of, run_replicas, taken):
    layer = layer_of(momentum=1.0, dtype=torch.float32)
    batch = (torch.randn(16, C, 28, 28) + mean).contiguous(memory_format=layout)
    run_replicas(layer, [part.clone() for part in batch.split([5, 11])])
    assert taken == [2]
    torch.testing.assert_close(layer.running_var.double(), batch.double().var((0, 2, 3)), rtol=1e-4, atol=0)


@LAYOUTS
def test_in_float64_a_mean_far_from_zero_costs_few_digits(layout, layer_of, run_replicas, taken):
    layer = layer_of(momentum=1.0)
    batch = (torch.randn(16, C, 6, 7, dtype=torch.float64) + 1e6).contiguous(memory_format=layout)
    run_replicas(layer, [part.clone() for part in batch.split([5, 11])])
    assert taken == [2]
    # By a shifted copy, where NumPy and torch too keep all digits.
    expected = (batch - 1e6).var((0, 2, 3))
    torch.testing.assert_close(layer.running_var, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_needs_more_digits_updates_the_running_statistics_once(
    momentum, layer_of, chunks_of, run_replicas, taken
):
    layer = layer_of(momentum=momentum, dtype=torch.float32)
    expected = layer.running_mean.double()
    for number in (1, 2, 3):
        chunks = [chunk + 1000 for chunk in chunks_of(2, 3, dtype=torch.float32)]
        run_replicas(layer, chunks)
        share = 1 / number if momentum is None else momentum
        expected = (1 - share) * expected + share * torch.cat(chunks).double().mean((0, 2, 3))
        torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-6, atol=0)
        assert layer.num_batches_tracked == number
    assert taken == [2, 2, 2]


FAR = {  # mean and standard deviation in every replica; it is far where one is over 10 times the other
    "all": [(3e5, 1.0)] * 3,
    "all, and channels of few digits": [(1000.0, 0.001)] * 3,
    "the first": [(3e4, 1.0), (0.0, 1.0), (2.0, 1.0)],
    "the last": [(2.0, 1.0), (0.0, 1.0), (-3e4, 1.0)],
    "one, among wide ones of the same mean": [(3e4, 6e3), (3e4, 1.0), (3e4, 6e3)],
}


def standardized(chunks):
    batch = torch.cat(chunks).double()
    mean, std = batch.mean((0, 2, 3), keepdim=True), batch.std((0, 2, 3), keepdim=True)
    return [(chunk - mean) / std for chunk in chunks]


@LAYOUTS
@pytest.mark.parametrize("far", FAR)
def test_means_far_from_zero_cost_no_digits_but_those_of_the_inputs(
    far, layout, layer_of, chunks_of, against_float64, taken
):
    layer = layer_of(dtype=torch.float32, momentum=1.0)
    chunks = [
        ((chunk - 1) / 3 * std + mean).float().contiguous(memory_format=layout)
        for chunk, (mean, std) in zip(chunks_of(4, 2, 6, spatial=(16, 15)), FAR[far])
    ]
    dys = [(torch.randn(x.shape) + 1 + x).float() for x in standardized(chunks)]
    ours, expected = against_float64(layer, chunks, dys)
    assert taken == [3]
    torch.testing.assert_close(ours["running_var"].double(), expected["running_var"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["running_mean"].double(), expected["running_mean"], rtol=1e-6, atol=0)
    deviation = expected["running_var"].sqrt()
    # The rounding of float32 at this mean, in standard deviations.
    rounding = (expected["running_mean"].abs().max() / deviation.min()).item() * 2**-24
    torch.testing.assert_close(ours["y"].double(), expected["y"], rtol=1e-5, atol=5e-5 + 4 * rounding)
    dx, expected_dx = (made["dx"] * deviation.view(1, C, 1, 1) for made in (ours, expected))
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=5e-5 + 4 * rounding)
    # Sums of 2880 numbers.
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(ours[name].double(), expected[name], rtol=1e-5, atol=1e-2)


@LAYOUTS
def test_the_rounding_of_a_mean_far_from_zero_is_not_in_the_gradient_of_the_input(
    layout, randomize, against_float64, taken
):
    channels = 512
    mean = 3e4 * (1 + torch.rand(1, channels, 1, 1))
    chunks = [(torch.randn(size, channels, 3, 5) + mean).contiguous(memory_format=layout) for size in (4, 2)]
    dys = [x.float() for x in standardized(chunks)]
    ours, expected = against_float64(randomize(SynchronizedBatchNorm2d(channels)), chunks, dys)
    assert taken == [2]
    exact = torch.cat(chunks).double().mean((0, 2, 3))
    rounding = exact.float() - exact
    error = (ours["dx"] - expected["dx"]).mean((0, 2, 3))
    slope = (error @ rounding) / (rounding @ rounding)
    assert abs(slope) < 0.4  # 0 up to chance; with the error it would be the mean weight, 1


# The graph


def nodes_behind(node):
    seen, ahead = set(), [node]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [behind for behind, _ in node.next_functions]
    return seen


def test_the_graph_is_one_node_for_all_replicas(layer_of, chunks_of, leaves_of, run_replicas, taken):
    layer, inputs = layer_of(), leaves_of(chunks_of(2, 1, 3))
    outputs = run_replicas(layer, inputs)  # a node lives as long as they do
    first, *others = [y.grad_fn for y in outputs]
    assert taken == [3]
    assert all(other is first for other in others)
    leaves = nodes_behind(first) - {first}
    assert {id(node.variable) for node in leaves} == {id(leaf) for leaf in (*inputs, *layer.parameters())}
    assert len(leaves) == 5


def test_if_nothing_needs_a_gradient_there_is_no_graph(layer_of, chunks_of, run_replicas, taken):
    outputs = run_replicas(layer_of().requires_grad_(False), chunks_of(2, 3))
    assert taken == [2]
    assert not any(y.requires_grad for y in outputs)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "used", [[1, 2], [0, 2], [0, 1], [0], [1], [2]], ids=lambda used: f"only {used} in the loss"
)
@LAYOUTS
def test_a_replica_that_the_loss_ignores_still_gets_its_gradient(
    used, layout, layer_of, chunks_of, check, taken
):
    ours = check(
        layer_of(), chunks_of(2, 1, 3, layout=layout), behind=lambda outputs: [outputs[r] for r in used]
    )
    assert taken == [3]
    for dx in ours["dx"]:
        assert dx.abs().max() > 1e-4


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "frozen",
    [
        *("weight", "bias", "weight bias", "x0", "x1", "x0 x2", "x0 x1 x2"),
        *("x0 x1 weight bias", "x0 x1 x2 weight", "x0 x1 x2 bias"),
    ],
)
def test_tensors_that_need_no_gradient_get_none_and_change_no_other(
    frozen, layer_of, chunks_of, leaves_of, stock_twin, as_one_batch, run_replicas, loss_of, taken
):
    layer, chunks = layer_of(), chunks_of(2, 1, 3)
    twin = stock_twin(layer, 2)
    made = []
    for model, forward in ((layer, run_replicas), (twin, as_one_batch)):
        leaves = {f"x{rank}": x for rank, x in enumerate(leaves_of(chunks))}
        inputs = list(leaves.values())
        leaves.update(model.named_parameters())
        for name in frozen.split():
            leaves[name].requires_grad_(False)
        loss_of(forward(model, inputs)).backward()
        made.append({name: leaf.grad for name, leaf in leaves.items()})
    assert taken == [3]
    assert " ".join(name for name, gradient in made[0].items() if gradient is None) == frozen
    torch.testing.assert_close(*made, **TIGHT)


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"], ["x1"]], ids=str)
def test_a_second_derivative_is_refused_whatever_else_needs_a_gradient(
    frozen, layer_of, chunks_of, leaves_of, replicas_of, loss_of, taken
):
    layer, inputs = layer_of(), leaves_of(chunks_of(2, 1, 3))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    inputs[1].requires_grad_("x1" not in frozen)
    loss = loss_of(replicas_of(nn.Sequential(layer), 3).run(lambda replica, rank: replica(inputs[rank])))
    assert taken == [3]
    gradients = torch.autograd.grad(loss, [inputs[0], inputs[2]], create_graph=True)
    # Not the penalty alone: that of constants would be torch's error, but this sum would be silently wrong.
    with pytest.raises(RuntimeError, match=r"through net\.0, .*fused=False"):
        (loss + sum(g.pow(2).sum() for g in gradients)).backward()


def test_a_gradient_penalty_on_parameters_is_refused(
    layer_of, chunks_of, leaves_of, run_replicas, loss_of, taken
):
    layer = layer_of()
    loss = loss_of(run_replicas(layer, chunks_of(2, 1, 3)))
    assert taken == [3]
    gradients = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"through net, .*fused=False"):
        (loss + sum(g.pow(2).sum() for g in gradients)).backward()


# In-place changes


def test_every_replica_may_change_its_output_in_place(layer_of, chunks_of, as_one_batch, check, taken):
    def call(layer, x, rank):
        return nn.functional.relu(layer(x), inplace=True)

    def whole(twin, inputs):
        return [nn.functional.relu(y) for y in as_one_batch(twin, inputs)]

    check(layer_of(), chunks_of(2, 1, 3), call, whole=whole)
    assert taken == [3]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_change_of_one_output_does_not_affect_the_others(
    changed, layer_of, chunks_of, leaves_of, stock_twin, as_one_batch, run_replicas, loss_of, taken
):
    layer, chunks = layer_of(), chunks_of(2, 1, 3)
    twin, inputs, expected = stock_twin(layer, 2), leaves_of(chunks), leaves_of(chunks)
    outputs = run_replicas(layer, inputs)
    assert taken == [3]
    before = [(y._version, y.detach().clone()) for y in outputs]
    # The squares save the outputs, so autograd would notice if they were taken for changed.
    squares = [y if rank == changed else y * y for rank, y in enumerate(outputs)]
    outputs[changed].mul_(5)
    for rank, (version, values) in enumerate(before):
        assert (outputs[rank]._version == version) == (rank != changed)
        torch.testing.assert_close(outputs[rank].detach(), values * (5 if rank == changed else 1), **EXACTLY)
    loss_of(squares).backward()

    wholes = as_one_batch(twin, expected)
    loss_of([5 * y if rank == changed else y * y for rank, y in enumerate(wholes)]).backward()
    torch.testing.assert_close([x.grad for x in inputs], [x.grad for x in expected], **TIGHT)


@pytest.mark.pairwise
@pytest.mark.parametrize("changed", range(5))
@pytest.mark.parametrize("used", [[0, 1, 2], [1]], ids=["all in the loss", "one in the loss"])
def test_a_change_of_one_gradient_does_not_affect_the_others(
    used, changed, layer_of, chunks_of, leaves_of, run_replicas, loss_of, taken
):
    layer, inputs = layer_of(), leaves_of(chunks_of(2, 1, 3))
    outputs = run_replicas(layer, inputs)
    assert taken == [3]
    gradients = torch.autograd.grad(loss_of(outputs[rank] for rank in used), [*inputs, *layer.parameters()])
    before = [(gradient._version, gradient.clone()) for gradient in gradients]
    gradients[changed].mul_(5)
    for which, (version, values) in enumerate(before):
        assert (gradients[which]._version == version) == (which != changed)
        torch.testing.assert_close(gradients[which], values * (5 if which == changed else 1), **EXACTLY)


def test_gradients_of_weight_and_bias_share_no_memory(layer_of, chunks_of, run_replicas, loss_of, taken):
    layer = layer_of()
    loss_of(run_replicas(layer, chunks_of(2, 1, 3))).backward()
    assert taken == [3]
    weight, bias = (parameter.grad for parameter in layer.parameters())
    assert weight.untyped_storage().data_ptr() != bias.untyped_storage().data_ptr()


# Every kind of input and of layer


@pytest.mark.parametrize("ranks", [[0], [2], [0, 1, 2]], ids=str)
def test_inputs_that_are_not_dense(ranks, layer_of, chunks_of, as_one_batch, check, taken):
    chunks = chunks_of(2, 3, 2)
    for rank in ranks:
        chunks[rank] = chunks[rank].repeat_interleave(2, -1)
    check(
        layer_of(),
        chunks,
        lambda layer, x, rank: layer(x[..., ::2] if rank in ranks else x),
        whole=lambda twin, inputs: as_one_batch(
            twin, [x[..., ::2] if rank in ranks else x for rank, x in enumerate(inputs)]
        ),
    )
    assert taken == [3]


@pytest.mark.parametrize("shape", [(0, C, 3, 5), (2, C, 0, 5)], ids=str)
def test_empty_batches_give_empty_outputs_and_update_nothing(shape, layer_of, leaves_of, run_replicas, taken):
    layer = layer_of()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    inputs = leaves_of([torch.empty(shape, dtype=torch.float64)] * 2)
    outputs = run_replicas(layer, inputs)
    sum(y.sum() for y in outputs).backward()
    assert taken == [2]
    assert all(y.shape == shape for y in outputs)
    assert all(x.grad.shape == shape for x in inputs)
    for parameter in layer.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), **EXACTLY)
    torch.testing.assert_close(dict(layer.state_dict()), before, **EXACTLY)


class OtherMeanStd(SynchronizedBatchNorm2d):
    def _compute_mean_std(self, mean, m2, count):
        return super()._compute_mean_std(mean, m2, count)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SynchronizedBatchNorm2d, {"eps_mode": "clamp"}), (OtherMeanStd, {})],
    ids=["eps mode clamp", "another mean and std"],
)
def test_layers_that_differ_from_torchs_own(kind, options, layer_of, chunks_of, check, taken):
    # No variance is below eps, so clamp differs from plus by eps alone, which is too small to show.
    check(layer_of(kind, eps=1e-14, **options), chunks_of(2, 1, 3))
    assert taken == [3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@LAYOUTS
def test_layers_of_halves(
    layout, dtype, layer_of, chunks_of, step, run_replicas, stock_twin, as_one_batch, taken
):
    layer, chunks = layer_of(dtype=dtype), chunks_of(2, 1, dtype=dtype, layout=layout)
    twin = stock_twin(layer, 2).double()
    ours = step(layer, chunks, run_replicas)
    theirs = step(twin, [chunk.double() for chunk in chunks], as_one_batch)
    assert taken == [2]
    tolerance = 16 * torch.finfo(dtype).eps
    for name in ("y", "dx"):
        assert all(made.dtype is dtype for made in ours[name])
        torch.testing.assert_close(
            [made.double() for made in ours[name]], theirs[name], rtol=tolerance, atol=tolerance
        )


# Errors


@RANKS
def test_a_single_value_per_channel_is_an_error_that_names_the_layer(
    rank, layer_of, chunks_of, replicas_of, taken
):
    layer = layer_of(SynchronizedBatchNorm1d)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    chunks = chunks_of(*(int(other == rank) for other in range(3)), spatial=())
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel .* got 1 in all .*'net\.0'"
    ):
        replicas_of(nn.Sequential(layer), 3).run(lambda replica, rank: replica(chunks[rank]))
    assert taken == []
    torch.testing.assert_close(dict(layer.state_dict()), before, **EXACTLY)


@RANKS
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False, "track_running_stats": False}],
    ids=["layer with tensors", "layer without any"],
)
def test_inputs_of_two_dtypes_are_an_error_that_names_the_layer(
    rank, options, layer_of, chunks_of, replicas_of, taken
):
    layer = layer_of(dtype=torch.float32, **options)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    chunks = chunks_of(2, 1, 3, dtype=torch.bfloat16)
    chunks[rank] = chunks[rank].float()
    with pytest.raises(TypeError, match=rf"one dtype .* at 'net\.0', got .*float32 in replica {rank}"):
        replicas_of(nn.Sequential(layer), 3).run(lambda replica, rank: replica(chunks[rank]))
    assert taken == []
    torch.testing.assert_close(dict(layer.state_dict()), before, **EXACTLY)


# Three nodes


@RANKS
def test_a_checkpoint_in_one_replica(rank, layer_of, chunks_of, check, taken):
    def call(layer, x, of):
        return checkpoint(layer, x, use_reentrant=False) if of == rank else layer(x)

    check(layer_of(), chunks_of(2, 1, 3), call)
    assert taken == []


@RANKS
def test_hooks_of_one_replica_see_what_that_replica_saves_and_nothing_else(
    rank, layer_of, chunks_of, check, taken
):
    own, seen = [], []

    def pack(tensor):
        seen.append(tensor)
        return tensor

    def call(layer, x, of):
        if of != rank:
            return layer(x)
        own.append(x)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return layer(x)

    check(layer_of(), chunks_of(2, 1, 3), call)
    assert taken == []
    assert {t.data_ptr() for t in seen if t.dim() == 4} == {own[0].data_ptr()}


@pytest.mark.pairwise
@pytest.mark.parametrize("needs_input_gradients", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("without", [[0], [2], [0, 1, 2]], ids=str)
def test_a_replica_without_grad_mode_has_no_graph_and_changes_nothing_for_the_others(
    without,
    fused,
    needs_input_gradients,
    layer_of,
    chunks_of,
    leaves_of,
    stock_twin,
    as_one_batch,
    replicas_of,
    loss_of,
    taken,
):
    layer, chunks = layer_of(fused=fused), chunks_of(2, 1, 3)
    twin = stock_twin(layer, 2)
    inputs, expected = (
        [x.requires_grad_(needs_input_gradients) for x in leaves_of(chunks)] for _ in range(2)
    )

    def forward(replica, rank):
        with torch.set_grad_enabled(rank not in without):
            return replica(inputs[rank])

    outputs = replicas_of(layer, 3).run(forward)
    assert taken == []
    assert [y.requires_grad for y in outputs] == [rank not in without for rank in range(3)]
    wholes = as_one_batch(twin, expected)
    torch.testing.assert_close(outputs, wholes, **TIGHT)
    torch.testing.assert_close(dict(layer.state_dict()), dict(twin.state_dict()), **TIGHT)
    with_graph = [rank for rank in range(3) if rank not in without]
    if with_graph:
        loss_of(outputs[rank] for rank in with_graph).backward()
        loss_of(wholes[rank] for rank in with_graph).backward()
        for rank in with_graph:
            torch.testing.assert_close(inputs[rank].grad, expected[rank].grad, **TIGHT)
        for ours, theirs in zip(layer.parameters(), twin.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, **TIGHT)


class OtherMaster(SynchronizedBatchNorm2d):
    def _data_parallel_master(self, intermediates):
        return super()._data_parallel_master(intermediates)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SynchronizedBatchNorm2d, {"fused": False}), (OtherMaster, {})],
    ids=["composite", "another master callback"],
)
def test_layers_without_one_node(kind, options, layer_of, chunks_of, check, taken):
    check(layer_of(kind, **options), chunks_of(2, 1, 3))
    assert taken == []


@RANKS
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_is_counted_once_if_one_replica_needs_three_nodes(
    rank, momentum, layer_of, chunks_of, check, taken
):
    def call(layer, x, of):
        if of != rank:
            return layer(x)
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return layer(x)

    layer = layer_of(momentum=momentum)
    for number in (1, 2, 3):
        check(layer, chunks_of(2, 1, 3), call)
        assert layer.num_batches_tracked == number
    assert taken == []
