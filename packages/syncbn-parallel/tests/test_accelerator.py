"""Replicas on the devices of an accelerator, simulated where there is none: see tests/accelerator."""

import copy
import threading

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback, replicate

pytestmark = pytest.mark.usefixtures("accelerator")

PLACES = [[0], [0, 1], [0, 0], [0, 1, 2, 3], [2, 0, 2], ["sim:1", "sim:3"], ["sim:0", 1]]
EXACT = {"rtol": 0, "atol": 1e-12}


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 3),
        nn.Flatten(),
        nn.Linear(32, 3),
    ).double()


def device_of(place):
    return torch.device("sim", place) if isinstance(place, int) else torch.device(place)


@pytest.mark.parametrize("device_ids", PLACES)
@pytest.mark.parametrize("batch", [8, 5, 1])
def test_output_and_gradients_are_those_of_the_whole_batch(device_ids, batch):
    net, first = convolutions(), device_of(device_ids[0])
    model = DataParallelWithCallback(copy.deepcopy(net).to(first), device_ids)
    x, weights = torch.randn(batch, 3, 6, 6).double(), torch.randn(batch, 3).double()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = model(ours)
    assert y.device == first
    (y * weights.to(first)).sum().backward()
    (net(theirs) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)
    for one, other in zip(model.parameters(), net.parameters(), strict=True):
        assert one.grad.device == first
        torch.testing.assert_close(one.grad.cpu(), other.grad, **EXACT)


class Gather(nn.Module):
    """Subtracts the mean of the whole batch, merged on the CPU."""

    def __data_parallel_replicate__(self, ctx, copy_id):
        self.member = ctx.group.member(copy_id)

    def forward(self, x):
        parts = self.member.all_gather(x.cpu())
        return x - torch.cat(parts).mean(0).to(x.device)


def test_replicas_on_several_devices_synchronize():
    x = torch.randn(7, 4).double()
    model = DataParallelWithCallback(Gather(), [0, 1, 2])
    torch.testing.assert_close(model(x).cpu(), x - x.mean(0), **EXACT)


def test_replicas_hold_the_modules_parameters_at_home_and_copies_elsewhere():
    module = nn.BatchNorm2d(3).to("sim:0")
    home, away, again = replicate(module, [0, 1, "sim:1"])
    assert home.weight is module.weight
    assert home.running_mean is module.running_mean
    assert away.weight.device == torch.device("sim", 1)
    assert away.weight.grad_fn is not None
    assert away.weight is again.weight
    assert away.running_mean is not again.running_mean


def test_a_number_is_a_device_of_the_accelerator_and_none_is_all_of_them():
    model = DataParallelWithCallback(nn.Linear(2, 2).to("sim"))
    assert [str(device) for device in model.device_ids] == ["sim:0", "sim:1", "sim:2", "sim:3"]
    assert DataParallelWithCallback(nn.Linear(2, 2), [3, 1]).device_ids == [
        torch.device("sim", 3),
        torch.device("sim", 1),
    ]
    assert DataParallelWithCallback(nn.Linear(2, 2), ["sim"]).device_ids == [torch.device("sim", 0)]


def test_devices_that_do_not_exist_and_mixed_kinds_are_refused():
    with pytest.raises(
        ValueError, match=r"devices that exist, got sim:4, sim:7 .* with 4 devices of kind 'sim'"
    ):
        DataParallelWithCallback(nn.Linear(2, 2), [0, 4, 7])
    with pytest.raises(ValueError, match="of one kind"):
        DataParallelWithCallback(nn.Linear(2, 2), ["cpu", 0])


@pytest.mark.parametrize(
    ("output_device", "expected"),
    [(None, "sim:0"), (2, "sim:2"), ("sim:3", "sim:3"), (-1, "cpu"), ("cpu", "cpu")],
)
def test_the_output_goes_to_the_requested_device(output_device, expected):
    model = DataParallelWithCallback(convolutions().to("sim"), [0, 1], output_device=output_device)
    assert str(model(torch.randn(4, 3, 6, 6).double()).device) == expected


@pytest.mark.parametrize("device_ids", [[0, 1, 2, 3], [0, 0]])
def test_the_host_reads_nothing(accelerator, device_ids):
    model = DataParallelWithCallback(convolutions().to("sim"), device_ids)
    x = torch.randn(8, 3, 6, 6).double().to("sim")
    with accelerator.counted() as launches:
        model(x).sum().backward()
    assert launches["convolution_overrideable"] == 2 * len(device_ids)
    assert not [name for name in launches if "host" in name]


def test_each_parameter_is_copied_once_to_each_other_device(accelerator):
    model = DataParallelWithCallback(nn.Linear(3, 2).to("sim"), [0, 1, 1, 2])
    x = torch.randn(8, 3).to("sim")
    with accelerator.counted() as launches, torch.no_grad():
        model(x)
    copies = {"parameters": 2 * 2, "chunks": 3, "outputs": 3}
    assert launches["copy between devices"] == sum(copies.values())


class Probe(nn.Module):
    """Notes what `look` sees, by device."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen, self.lock = look, [], threading.Lock()

    def forward(self, x):
        with self.lock:
            self.seen.append((str(x.device), self.look()))
        return x


def seen(look, device_ids=(0, 1, 2)):
    probe = Probe(look)
    DataParallelWithCallback(probe, list(device_ids))(torch.zeros(2 * len(device_ids), 1, device="sim"))
    return sorted(probe.seen, key=lambda entry: entry[0])


def test_a_replica_runs_on_its_own_device():
    torch.accelerator.set_device_index(2)
    try:
        assert seen(torch.accelerator.current_device_index) == [("sim:0", 0), ("sim:1", 1), ("sim:2", 2)]
        assert torch.accelerator.current_device_index() == 2
    finally:
        torch.accelerator.set_device_index(0)


def streams_of_all_devices():
    return [torch.accelerator.current_stream(index).stream_id for index in range(3)]


def test_every_replica_has_the_callers_streams_of_all_devices_and_gives_them_back():
    """Replica 0 also reads what the others have written, on their devices."""
    before = streams_of_all_devices()
    streams = [torch.Stream(f"sim:{index}") for index in range(3)]
    for stream in streams:
        torch.accelerator.set_stream(stream)
    try:
        expected = [stream.stream_id for stream in streams]
        assert streams_of_all_devices() == expected
        assert seen(streams_of_all_devices) == [(f"sim:{i}", expected) for i in range(3)]
        assert streams_of_all_devices() == expected
    finally:
        for index, stream_id in enumerate(before):
            stream = torch.Stream(stream_id=stream_id, device_index=index, device_type=streams[0].device_type)
            torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(0)
    assert seen(streams_of_all_devices) == [(f"sim:{i}", before) for i in range(3)]


# torch's own: of a copy's backward it takes the default stream of the other device, and waits once too often.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@pytest.mark.parametrize("device_ids", [[0, 1, 2], [0, 0], [1, 0]])
def test_a_step_on_streams_of_the_callers_own_has_no_race(device_ids):
    """The simulated accelerator fails where an operation uses what another stream wrote, without an event."""
    home = torch.device("sim", device_ids[0])
    model = DataParallelWithCallback(convolutions().to(home), device_ids)
    x = torch.randn(6, 3, 6, 6).double()
    for index in sorted(set(device_ids), key=lambda index: index == home.index):
        torch.sim.synchronize(index)
        torch.accelerator.set_stream(torch.Stream(f"sim:{index}"))
    try:
        y = model(x)
        y.sum().backward()
    finally:
        for index in range(4):
            torch.sim.synchronize(index)
            torch.accelerator.set_stream(torch.sim.default_stream(index))
        torch.accelerator.set_device_index(0)
    torch.testing.assert_close(y.cpu(), convolutions()(x), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_accelerator_reaches_the_replicas(dtype):
    look = lambda: (torch.is_autocast_enabled("sim"), torch.get_autocast_dtype("sim"))  # noqa: E731
    with torch.autocast("sim", dtype=dtype):
        assert seen(look) == [(f"sim:{i}", (True, dtype)) for i in range(3)]
    assert not any(enabled for _, (enabled, _) in seen(look))


def test_a_parameter_that_changes_in_place_on_a_shared_device_is_an_error():
    class Halves(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(0.5)
            return super().forward(x)

    with pytest.raises(RuntimeError, match="'weight' changed in place: 2 replicas on sim:1 share it"):
        DataParallelWithCallback(Halves(3, 2).to("sim:1"), [1, 1])(torch.randn(4, 3))
    module = Halves(3, 2).to("sim:0")
    before = module.weight.detach().clone()
    DataParallelWithCallback(module, [0, 1])(torch.randn(4, 3))  # one replica on each device, as torch has it
    torch.testing.assert_close(module.weight.detach(), before * 0.5)


@pytest.mark.parametrize("device_ids", [[0, 0], [0, 1, 2], [1, 0]])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_an_input_on_a_device_that_changes_in_place_is_that_of_the_single_model(device_ids, requires_grad):
    home = torch.device("sim", device_ids[0])
    x, weights = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    results = []
    for wrap in (lambda module: module, lambda module: DataParallelWithCallback(module, device_ids)):
        own = x.to(home).requires_grad_(requires_grad)
        code = own * 2 + 1
        output = wrap(nn.Sequential(nn.ReLU(inplace=True), nn.Tanh()))(code)
        if requires_grad:
            (output * weights.to(home) + code * 3).sum().backward()
        results.append(
            [output.detach().cpu(), code.detach().cpu(), own.grad if own.grad is None else own.grad.cpu()]
        )
    torch.testing.assert_close(results[1][:2], results[0][:2], **EXACT)
    if requires_grad:
        torch.testing.assert_close(results[1][2], results[0][2], **EXACT)


def test_a_failure_names_the_device():
    class Greedy(nn.Module):
        def forward(self, x):
            if x.device.index == 1:
                raise MemoryError
            return x

    with pytest.raises(MemoryError) as caught:
        DataParallelWithCallback(Greedy(), [0, 1])(torch.zeros(4, 4))
    assert caught.value.__notes__ == ["raised in replica 1 (of 0 to 1) on sim:1"]


def test_replicas_on_the_cpu_work_beside_the_accelerator():
    x = torch.randn(4, 3, 6, 6).double()
    actual = DataParallelWithCallback(convolutions(), ["cpu"] * 2)(x)
    torch.testing.assert_close(actual, convolutions()(x), **EXACT)
