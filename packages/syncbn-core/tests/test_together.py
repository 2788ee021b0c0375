"""Small batches are normalised as the one batch that they are; whatever makes no one batch, apart as ever."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    _together,
)
from syncbn_core._replication import may_be_intercepted

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="this torch does not tell whether what is saved is intercepted"
)

C = 4
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
EXACTLY = {"rtol": 0, "atol": 0}
RANKS = pytest.mark.parametrize("rank", [0, 1, 2])
LAYOUTS = pytest.mark.parametrize(
    ("kind", "spatial", "layout"),
    [
        (SynchronizedBatchNorm1d, (), torch.contiguous_format),
        (SynchronizedBatchNorm1d, (5,), torch.contiguous_format),
        (SynchronizedBatchNorm2d, (3, 5), torch.contiguous_format),
        (SynchronizedBatchNorm2d, (3, 5), torch.channels_last),
        (SynchronizedBatchNorm3d, (2, 3, 2), torch.contiguous_format),
        (SynchronizedBatchNorm3d, (2, 3, 2), torch.channels_last_3d),
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def joined(monkeypatch):
    """How many inputs were normalised as one batch, for every time that this was done."""
    calls = []
    batch_norm = _together.batch_norm

    def spy(inputs, *rest):
        outputs = batch_norm(inputs, *rest)
        if outputs is not None:
            calls.append(len(inputs))
        return outputs

    monkeypatch.setattr(_together, "batch_norm", spy)
    return calls


@pytest.fixture
def layer_of(randomize):
    return lambda kind=SynchronizedBatchNorm2d, **options: randomize(
        kind(C, **{"dtype": torch.float64, **options})
    )


def chunks_of(*sizes, spatial=(3, 5), layout=torch.contiguous_format, dtype=torch.float64):
    return [
        (torch.randn(size, C, *spatial, dtype=dtype) * 3 + 1).contiguous(memory_format=layout)
        for size in sizes
    ]


def leaves_of(chunks):
    return [chunk.detach().clone().requires_grad_() for chunk in chunks]


def call(layer, x, rank):
    return layer(x)


@pytest.fixture
def loss_of(weighted_sum):
    """Weight each output differently, those of different replicas too."""
    return lambda outputs: sum((rank + 1) * weighted_sum(y) for rank, y in enumerate(outputs))


@pytest.fixture
def step(loss_of):
    """One forward and backward: all that the layer makes of the chunks."""

    def run(layer, chunks, forward, behind=lambda outputs: outputs):
        layer.zero_grad()
        inputs = leaves_of(chunks)
        outputs = behind(forward(layer, inputs))
        loss_of(outputs).backward()
        return {
            "y": [y.detach() for y in outputs],
            "dx": [x.grad for x in inputs],
            **{f"d{name}": parameter.grad for name, parameter in layer.named_parameters()},
            **{name: buffer.clone() for name, buffer in layer.named_buffers()},
        }

    return run


def as_one_batch(twin, inputs):
    """Torch's own layer on the rows of all inputs, whatever their spatial sizes."""
    rows = [x.movedim(1, -1).flatten(0, -2) for x in inputs]
    parts = twin(torch.cat(rows)).split([len(part) for part in rows])
    return [part.view(x.movedim(1, -1).shape).movedim(-1, 1) for part, x in zip(parts, inputs)]


@pytest.fixture
def check(step, stock_twin, replicas_of):
    """Show that a step of replicas is that of torch's own layer on the whole batch."""

    def check(layer, chunks, call=call, behind=lambda outputs: outputs, whole=as_one_batch):
        twin = stock_twin(layer, 2)

        def replicas(layer, inputs):
            replicas = replicas_of(layer, len(inputs))
            return replicas.run(lambda replica, rank: call(replica, inputs[rank], rank))

        ours = step(layer, chunks, replicas, behind)
        torch.testing.assert_close(ours, step(twin, chunks, whole, behind), **TIGHT)
        return ours

    return check


# What is one batch


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_and_gradients_are_as_the_inputs_in_dtype_and_layout(
    kind, spatial, layout, dtype, layer_of, run_replicas, loss_of, joined
):
    chunks = [
        chunk.requires_grad_() for chunk in chunks_of(2, 3, spatial=spatial, layout=layout, dtype=dtype)
    ]
    outputs = run_replicas(layer_of(kind, dtype=dtype), chunks)
    loss_of(y**2 for y in outputs).backward()
    assert joined == [2]
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1
    for x, y in zip(chunks, outputs):
        assert x.shape == y.shape == x.grad.shape
        assert x.stride() == y.stride() == x.grad.stride()
        assert y.dtype == x.grad.dtype == dtype


@LAYOUTS
@pytest.mark.parametrize("sizes", [(2, 1, 3), (0, 4), (3, 0, 0, 2), (1,) * 8], ids=str)
def test_several_replicas_are_one_batch(kind, spatial, layout, sizes, layer_of, check, joined):
    check(layer_of(kind), chunks_of(*sizes, spatial=spatial, layout=layout))
    assert joined == [len(sizes)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_may_come_in_layouts_of_their_own(layout, layer_of, check, joined):
    def behind(outputs):
        first, second = outputs
        return [
            first.contiguous(memory_format=torch.channels_last) * 1,
            second[:, :, :, ::2].transpose(2, 3).contiguous(),
        ]

    check(layer_of(), chunks_of(2, 3, layout=layout), behind=behind)
    assert joined == [2]


@pytest.mark.parametrize("parameters", [{}, {"bias": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "untracked"])
def test_every_option_holds_over_several_steps(
    parameters, momentum, track_running_stats, layer_of, check, joined
):
    layer = layer_of(momentum=momentum, track_running_stats=track_running_stats, eps=0.3, **parameters)
    for number in (1, 2, 3):
        check(layer, chunks_of(2, 1, 3))
        assert joined == [3] * number
        if track_running_stats:
            assert layer.num_batches_tracked == number


@pytest.mark.parametrize("momentum", [0, 1])
def test_a_momentum_may_be_a_whole_number(momentum, layer_of, check, joined):
    check(layer_of(momentum=momentum), chunks_of(2, 1))
    assert joined == [2]


@RANKS
def test_a_replica_that_the_loss_ignores_still_gets_its_gradient(rank, layer_of, check, joined):
    ours = check(layer_of(), chunks_of(2, 1, 3), behind=lambda outputs: outputs[:rank] + outputs[rank + 1 :])
    assert joined == [3]
    assert ours["dx"][rank].abs().max() > 1e-3


def test_a_batch_of_up_to_the_limit_is_small_and_no_other(layer_of, check, joined, monkeypatch):
    chunks = chunks_of(2, 2)
    monkeypatch.setattr(_together, "UP_TO", chunks[0].numel())
    check(layer_of(), chunks)
    assert joined == [2]
    monkeypatch.setattr(_together, "UP_TO", chunks[0].numel() - 1)
    check(layer_of(), chunks)
    assert joined == [2]


def test_everything_is_bitwise_repeatable(layer_of, step, run_replicas, joined):
    layer, chunks = layer_of(dtype=torch.float32), chunks_of(7, 4, 6, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    steps = []
    for _ in range(20):
        layer.load_state_dict(state)
        steps.append(step(layer, chunks, run_replicas))
    assert joined == [3] * 20
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], **EXACTLY)


def test_one_layer_may_run_twice_in_a_forward(layer_of, check, joined):
    def twice(layer, x, rank):
        return layer(layer(x).tanh())

    def whole(twin, inputs):
        return as_one_batch(twin, [y.tanh() for y in as_one_batch(twin, inputs)])

    check(layer_of(), chunks_of(2, 3), twice, whole=whole)
    assert joined == [2, 2]


def test_where_nothing_needs_a_gradient_there_is_no_graph(layer_of, run_replicas, joined):
    outputs = run_replicas(layer_of().requires_grad_(False), chunks_of(2, 3))
    assert joined == [2]
    assert not any(y.requires_grad for y in outputs)


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"], ["x1"]], ids=str)
def test_a_second_derivative_is_refused_whatever_else_needs_a_gradient(
    frozen, layer_of, run_replicas, loss_of, joined
):
    layer, inputs = layer_of(), leaves_of(chunks_of(2, 1, 3))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    inputs[1].requires_grad_("x1" not in frozen)
    loss = loss_of(run_replicas(layer, inputs))
    assert joined == [3]
    gradients = torch.autograd.grad(loss, [inputs[0], inputs[2]], create_graph=True)
    # Not the penalty alone: that of constants would be torch's error, but this sum would be silently wrong.
    with pytest.raises(RuntimeError, match=r"through net, .*fused=False"):
        (loss + sum(g.pow(2).sum() for g in gradients)).backward()


# Outputs share one storage, but that is all


def test_every_replica_may_change_its_output_in_place(layer_of, check, joined):
    def call(layer, x, rank):
        return nn.functional.relu(layer(x), inplace=True)

    def whole(twin, inputs):
        return [nn.functional.relu(y) for y in as_one_batch(twin, inputs)]

    check(layer_of(), chunks_of(2, 1, 3), call, whole=whole)
    assert joined == [3]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_change_of_one_output_is_none_of_the_others(
    changed, layer_of, stock_twin, run_replicas, loss_of, joined
):
    layer, chunks = layer_of(), chunks_of(2, 1, 3)
    twin, inputs, expected = stock_twin(layer, 2), leaves_of(chunks), leaves_of(chunks)
    outputs = run_replicas(layer, inputs)
    assert joined == [3]
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


# What is not one batch


@RANKS
def test_one_large_batch_among_small_ones(rank, layer_of, check, joined, monkeypatch):
    chunks = chunks_of(*(4 if other == rank else 2 for other in range(3)))
    monkeypatch.setattr(_together, "UP_TO", chunks[rank].numel() - 1)
    check(layer_of(), chunks)
    assert joined == []


@RANKS
def test_other_spatial_sizes_in_one_replica(rank, layer_of, check, joined):
    chunks = chunks_of(2, 1, 3)
    (chunks[rank],) = chunks_of(2, spatial=(4, 2))
    check(layer_of(), chunks)
    assert joined == []


def test_inputs_of_several_numbers_of_axes(layer_of, check, joined):
    chunks = [*chunks_of(2, spatial=()), *chunks_of(3, spatial=(4,)), *chunks_of(1, spatial=(2, 3))]
    check(layer_of(SynchronizedBatchNorm), chunks)
    assert joined == []


@RANKS
def test_another_layout_in_one_replica(rank, layer_of, check, joined):
    chunks = chunks_of(2, 3, 2)
    chunks[rank] = chunks[rank].contiguous(memory_format=torch.channels_last)
    check(layer_of(), chunks)
    assert joined == []


@pytest.mark.parametrize("ranks", [[0], [2], [0, 1, 2]], ids=str)
def test_inputs_that_are_not_dense(ranks, layer_of, check, joined):
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
    assert joined == []


@RANKS
def test_a_checkpoint_in_one_replica(rank, layer_of, check, joined):
    def call(layer, x, of):
        return checkpoint(layer, x, use_reentrant=False) if of == rank else layer(x)

    check(layer_of(), chunks_of(2, 1, 3), call)
    assert joined == []


@RANKS
def test_hooks_of_one_replica_see_what_that_replica_saves_and_nothing_else(rank, layer_of, check, joined):
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
    assert joined == []
    assert {t.data_ptr() for t in seen if t.dim() == 4} == {own[0].data_ptr()}


@pytest.mark.parametrize("shape", [(0, C, 3, 5), (2, C, 0, 5)], ids=str)
def test_nothing_at_all_gives_nothing_and_teaches_nothing(shape, layer_of, run_replicas, joined):
    layer = layer_of()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    inputs = leaves_of([torch.empty(shape, dtype=torch.float64)] * 2)
    outputs = run_replicas(layer, inputs)
    sum(y.sum() for y in outputs).backward()
    assert joined == []
    assert all(y.shape == shape for y in outputs)
    assert all(x.grad.shape == shape for x in inputs)
    for parameter in layer.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), **EXACTLY)
    torch.testing.assert_close(dict(layer.state_dict()), before, **EXACTLY)


def test_a_single_value_per_channel_is_an_error_that_names_the_layer(layer_of, replicas_of, joined):
    layer = layer_of(SynchronizedBatchNorm1d)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    chunks = chunks_of(0, 1, 0, spatial=())
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel .* got 1 in all .*'net\.0'"
    ):
        replicas_of(nn.Sequential(layer), 3).run(lambda replica, rank: replica(chunks[rank]))
    assert joined == []
    torch.testing.assert_close(dict(layer.state_dict()), before, **EXACTLY)


@RANKS
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False, "track_running_stats": False}],
    ids=["layer with tensors", "layer without any"],
)
def test_inputs_of_two_dtypes_are_an_error_that_names_the_layer(rank, options, layer_of, replicas_of, joined):
    layer = layer_of(**options)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    chunks = chunks_of(2, 1, 3)
    chunks[rank] = chunks[rank].float()
    with pytest.raises(TypeError, match=rf"one dtype .* at 'net\.0', got .*float32 in replica {rank}"):
        replicas_of(nn.Sequential(layer), 3).run(lambda replica, rank: replica(chunks[rank]))
    assert joined == []
    torch.testing.assert_close(dict(layer.state_dict()), before, **EXACTLY)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("far", [[0], [3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.01), (1e4, 1.0), (1e6, 1.0), (-1e6, 1.0)])
def test_a_mean_far_from_zero_in_any_channel_costs_the_variance_no_digits(
    mean, std, far, layout, layer_of, run_replicas, joined
):
    layer = layer_of(momentum=1.0, dtype=torch.float32)
    batch = torch.randn(16, C, 28, 28, dtype=torch.float64) * std
    batch[:, far] += mean
    batch = batch.float().contiguous(memory_format=layout)
    run_replicas(layer, [part.clone() for part in batch.split([5, 11])])
    assert joined == []
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_var.double(), batch.double().var((0, 2, 3)), rtol=1e-4, atol=0)
    expected = batch.double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-6, atol=1e-6 * std)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_mean_not_far_from_zero_is_one_batch(layout, layer_of, run_replicas, joined):
    layer = layer_of(momentum=1.0, dtype=torch.float32)
    batch = (torch.randn(16, C, 28, 28) + 9).contiguous(memory_format=layout)
    run_replicas(layer, [part.clone() for part in batch.split([5, 11])])
    assert joined == [2]
    torch.testing.assert_close(layer.running_var.double(), batch.double().var((0, 2, 3)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_float64_a_mean_far_from_zero_is_one_batch(layout, layer_of, run_replicas, joined):
    layer = layer_of(momentum=1.0)
    batch = (torch.randn(16, C, 6, 7, dtype=torch.float64) + 1e6).contiguous(memory_format=layout)
    run_replicas(layer, [part.clone() for part in batch.split([5, 11])])
    assert joined == [2]
    # By a shifted copy, where NumPy and torch too keep all digits.
    expected = (batch - 1e6).var((0, 2, 3))
    torch.testing.assert_close(layer.running_var, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("odd_one", ["layout", "spatial sizes"])
def test_what_turns_out_to_be_no_one_batch_counts_once(odd_one, momentum, layer_of, check, joined):
    layer = layer_of(momentum=momentum)
    for number in (1, 2, 3):
        first, second = chunks_of(2, 3)
        if odd_one == "layout":
            second = second.contiguous(memory_format=torch.channels_last)
        else:
            second = second[..., :2].contiguous()
        check(layer, [first, second])
        assert layer.num_batches_tracked == number
    assert joined == []


@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_needs_more_digits_moves_the_running_statistics_once(momentum, layer_of, run_replicas, joined):
    layer = layer_of(momentum=momentum, dtype=torch.float32)
    expected = layer.running_mean.double()
    for number in (1, 2, 3):
        chunks = [chunk + 1000 for chunk in chunks_of(2, 3, dtype=torch.float32)]
        run_replicas(layer, chunks)
        share = 1 / number if momentum is None else momentum
        expected = (1 - share) * expected + share * torch.cat(chunks).double().mean((0, 2, 3))
        torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-6, atol=0)
        assert layer.num_batches_tracked == number
    assert joined == []


def test_without_grad_mode_there_is_no_graph_and_the_running_statistics_move(
    layer_of, stock_twin, run_replicas, joined
):
    layer, chunks = layer_of(), chunks_of(2, 1, 3)
    twin = stock_twin(layer, 2)
    with torch.no_grad():
        outputs = run_replicas(layer, chunks)
        expected = as_one_batch(twin, chunks)
    assert joined == []
    assert not any(y.requires_grad for y in outputs)
    torch.testing.assert_close(outputs, expected, **TIGHT)
    torch.testing.assert_close(dict(layer.state_dict()), dict(twin.state_dict()), **TIGHT)


class OtherMaster(SynchronizedBatchNorm2d):
    def _data_parallel_master(self, intermediates):
        return super()._data_parallel_master(intermediates)


class OtherMeanStd(SynchronizedBatchNorm2d):
    def _compute_mean_std(self, mean, m2, count):
        return super()._compute_mean_std(mean, m2, count)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SynchronizedBatchNorm2d, {"eps_mode": "clamp"}),
        (SynchronizedBatchNorm2d, {"fused": False}),
        (OtherMaster, {}),
        (OtherMeanStd, {}),
    ],
    ids=["eps mode clamp", "composite", "another master callback", "another mean and std"],
)
def test_what_torchs_own_layer_does_not_do_is_not_done_as_one_batch(kind, options, layer_of, check, joined):
    # No variance is under eps, so clamp differs from plus by eps alone, which is too small to tell.
    check(layer_of(kind, eps=1e-14, **options), chunks_of(2, 1, 3))
    assert joined == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_one_batch_where_the_layer_is_of_float32(dtype, layer_of, run_replicas, joined):
    run_replicas(layer_of(dtype=torch.float32), chunks_of(2, 1, dtype=dtype))
    assert joined == [2]
    run_replicas(layer_of(dtype=dtype), chunks_of(2, 1, dtype=dtype))
    assert joined == [2]


def test_torch_tells_whether_what_is_saved_is_intercepted():
    # Private to torch: without it, every test here would fail.
    assert not may_be_intercepted()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert may_be_intercepted()
    assert not may_be_intercepted()
