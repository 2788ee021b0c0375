"""Replicas on plain threads, without a wrapper, and the whole batch to compare with."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from syncbn_comm import ReplicaGroup
from syncbn_core import (
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    _base,
)
from syncbn_core._autograd import joined_node, one_node
from syncbn_core._replicas.recomputation import may_be_intercepted

JOIN_SECONDS = 60.0
CHANNELS = 4

Forward = Callable[[nn.Module, int], Any]


def run_threads(work: Callable[[int], Any], count: int) -> list[Any]:
    """Call ``work(rank)`` in a thread for each rank; return results and exceptions, in rank order."""
    outcomes: list[Any] = [None] * count
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        torch.set_grad_enabled(grad_enabled)  # threads do not inherit it
        try:
            outcomes[rank] = work(rank)
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def copy_module(model: nn.Module, rank: int) -> nn.Module:
    """Copy a model, except that its parameters, and the buffers of replica 0, are shared."""
    replica = model._replicate_for_data_parallel()
    replica._parameters = dict(model._parameters)
    if rank:
        replica._buffers = {k: None if b is None else b.clone() for k, b in model._buffers.items()}
    for name, child in model.named_children():
        replica._modules[name] = copy_module(child, rank)
    return replica


class Replicas:
    """The replicas of one forward of a model, whose layers are called "net.0", "net.1" and so on."""

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self.group = ReplicaGroup(world_size, timeout=JOIN_SECONDS / 2)
        self.modules = [copy_module(model, rank) for rank in range(world_size)]
        for rank, replica in enumerate(self.modules):
            for name, module in replica.named_modules():
                if hasattr(module, "__data_parallel_replicate__"):
                    context = SimpleNamespace(name=f"net.{name}".rstrip("."), group=self.group)
                    module.__data_parallel_replicate__(context, rank)

    def outcomes(self, forward: Forward) -> list[Any]:
        """Call ``forward(replica, rank)`` in one thread for each replica; return results and exceptions."""

        def work(rank: int) -> Any:
            with self.group.member(rank):
                return forward(self.modules[rank], rank)

        return run_threads(work, len(self.modules))

    def run(self, forward: Forward) -> list[Any]:
        """Do the same as `outcomes`, but raise the first failure here."""
        outcomes = self.outcomes(forward)
        if self.group.failure is not None:
            raise self.group.failure
        return outcomes


def run_replicas(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run one forward of a model, with one replica for each input."""
    return Replicas(model, len(inputs)).run(lambda replica, rank: replica(inputs[rank]))


def weighted_sum(y: Tensor) -> Tensor:
    """Weight every element differently: the gradient of a batch norm's plain sum is zero."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y * weights.to(y)).sum()


def stock_twin(layer: nn.Module, dims: int) -> nn.Module:
    """Build torch's own layer for inputs of ``dims`` axes, with the same arguments and state."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    twin = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    if layer.bias is None:
        twin.bias = None
    for tensor in layer.state_dict().values():
        twin.to(tensor.device, tensor.dtype if tensor.is_floating_point() else None)
    twin.load_state_dict(layer.state_dict())
    return twin


def randomize(layer: nn.Module) -> nn.Module:
    """Give a layer parameters and running statistics that are not 1 and 0."""
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return layer


def train_step(
    layer: nn.Module,
    chunks: Sequence[Tensor],
    forward: Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]],
) -> dict[str, Tensor | None]:
    """Run one forward and backward of all chunks; return everything that a batch norm computes."""
    inputs = [chunk.detach().clone(memory_format=torch.preserve_format).requires_grad_() for chunk in chunks]
    layer.zero_grad()
    y = torch.cat(list(forward(layer, inputs)))
    weighted_sum(y).backward()
    return {
        "y": y.detach(),
        "dx": torch.cat([x.grad for x in inputs]),
        **{f"d{name}": parameter.grad for name, parameter in layer.named_parameters()},
        **{name: buffer.clone() for name, buffer in layer.named_buffers()},
    }


def assert_equals_whole_batch(
    layer: nn.Module, chunks: Sequence[Tensor], **tolerance: float
) -> dict[str, Any]:
    """Train one step on replicas, and check that torch's own layer computes the same for the whole batch."""
    twin = stock_twin(layer, chunks[0].dim())
    ours = train_step(layer, chunks, run_replicas)
    theirs = train_step(twin, chunks, lambda twin, inputs: [twin(torch.cat(list(inputs)))])
    torch.testing.assert_close(ours, theirs, **tolerance)
    return ours


def chunks_of(
    *sizes: int,
    spatial: Sequence[int] = (3, 5),
    layout: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Make one batch for each size, with the channels of `layer_of`."""
    return [
        (torch.randn(size, CHANNELS, *spatial, dtype=dtype) * 3 + 1).contiguous(memory_format=layout)
        for size in sizes
    ]


def leaves_of(chunks: Sequence[Tensor]) -> list[Tensor]:
    """Copy them, with their layouts, to inputs that require grad."""
    return [chunk.detach().clone().requires_grad_() for chunk in chunks]


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """Weight each output differently, those of different replicas too."""
    return sum(((rank + 1) * weighted_sum(y) for rank, y in enumerate(outputs)), torch.zeros(()))


def as_one_batch(twin: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run torch's own layer on the rows of all inputs, whatever their spatial sizes."""
    rows = [x.movedim(1, -1).flatten(0, -2) for x in inputs]
    parts = twin(torch.cat(rows)).split([len(part) for part in rows])
    return [part.view(x.movedim(1, -1).shape).movedim(-1, 1) for part, x in zip(parts, inputs)]


def _as_they_are(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return outputs


def step(
    layer: nn.Module,
    chunks: Sequence[Tensor],
    forward: Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]],
    behind: Callable[[Sequence[Tensor]], Sequence[Tensor]] = _as_they_are,
) -> dict[str, Any]:
    """Do as `train_step` for chunks that cannot be joined, with a function between outputs and loss."""
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


def check(
    layer: nn.Module,
    chunks: Sequence[Tensor],
    call: Callable[[nn.Module, Tensor, int], Tensor] = lambda layer, x, rank: layer(x),
    behind: Callable[[Sequence[Tensor]], Sequence[Tensor]] = _as_they_are,
    whole: Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]] = as_one_batch,
) -> dict[str, Any]:
    """Check that a `step` of replicas equals that of torch's own layer on the whole batch, to 1e-12."""
    twin = stock_twin(layer, 2)

    def replicas(layer: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        return Replicas(layer, len(inputs)).run(lambda replica, rank: call(replica, inputs[rank], rank))

    ours = step(layer, chunks, replicas, behind)
    torch.testing.assert_close(ours, step(twin, chunks, whole, behind), rtol=1e-12, atol=1e-12)
    return ours


@pytest.fixture(autouse=True)
def _same_random_numbers_for_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["joined", "one node", "three nodes"])
def graph_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take one node for a joined batch; then one node for several batches; then three nodes.

    The batches of tests are small, so without this fixture all of them would be joined. A module opts in by
    ``pytest.mark.usefixtures``; a test of one kind alone selects it by an indirect parametrization.
    """
    kind: str = request.param
    if kind == "three nodes":
        monkeypatch.setattr(_base, "may_be_intercepted", lambda: True)
    elif may_be_intercepted():
        pytest.skip("this version of torch does not tell whether saved tensors are intercepted")
    elif kind == "one node":
        monkeypatch.setattr(joined_node, "JOINED_UP_TO", -1)
    return kind


@pytest.fixture
def one_node_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of replicas that share a node, for each node that was made."""
    calls: list[int] = []
    reduce = one_node.reduce

    def spy(shares: Sequence[Any], how: Any) -> Any:
        outputs = reduce(shares, how)
        calls.append(len(shares))
        return outputs

    monkeypatch.setattr(one_node, "reduce", spy)
    return calls


@pytest.fixture
def joined_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of inputs that were joined into one batch, for each such batch."""
    calls: list[int] = []
    reduce = joined_node.reduce

    def spy(inputs: Sequence[Any], how: Any) -> Any:
        outputs = reduce(inputs, how)
        if outputs is not None:
            calls.append(len(inputs))
        return outputs

    monkeypatch.setattr(joined_node, "reduce", spy)
    return calls


class Form(NamedTuple):
    """A kind of layer, and what its inputs look like."""

    kind: type[nn.Module]
    spatial: tuple[int, ...]
    layout: torch.memory_format


@pytest.fixture(
    params=[
        Form(SynchronizedBatchNorm1d, (), torch.contiguous_format),
        Form(SynchronizedBatchNorm1d, (5,), torch.contiguous_format),
        Form(SynchronizedBatchNorm2d, (3, 5), torch.contiguous_format),
        Form(SynchronizedBatchNorm2d, (3, 5), torch.channels_last),
        Form(SynchronizedBatchNorm3d, (2, 3, 2), torch.contiguous_format),
        Form(SynchronizedBatchNorm3d, (2, 3, 2), torch.channels_last_3d),
    ],
    ids=lambda form: f"{form.kind.__name__}-{form.spatial}-{form.layout}",
)
def form(request: pytest.FixtureRequest) -> Form:
    """Every dense layout, for every number of axes."""
    every: Form = request.param
    return every


@pytest.fixture
def layer_of() -> Callable[..., nn.Module]:
    """Build a layer with trained-like state, in float64 by default."""

    def build(kind: Any = SynchronizedBatchNorm2d, **options: Any) -> nn.Module:
        return randomize(kind(CHANNELS, **{"dtype": torch.float64, **options}))

    return build


# Test modules cannot import this one, but they can use it through a fixture.
def _fixture(helper: Any, name: str) -> Any:
    return pytest.fixture(name=name)(lambda: helper)


_replicas = _fixture(Replicas, "replicas_of")
_run_replicas = _fixture(run_replicas, "run_replicas")
_run_threads = _fixture(run_threads, "run_threads")
_stock_twin = _fixture(stock_twin, "stock_twin")
_randomize = _fixture(randomize, "randomize")
_train_step = _fixture(train_step, "train_step")
_assert_equals_whole_batch = _fixture(assert_equals_whole_batch, "assert_equals_whole_batch")
_weighted_sum = _fixture(weighted_sum, "weighted_sum")
_chunks_of = _fixture(chunks_of, "chunks_of")
_leaves_of = _fixture(leaves_of, "leaves_of")
_loss_of = _fixture(loss_of, "loss_of")
_as_one_batch = _fixture(as_one_batch, "as_one_batch")
_step = _fixture(step, "step")
_check = _fixture(check, "check")
