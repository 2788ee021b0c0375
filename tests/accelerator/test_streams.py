"""Streams are told apart: to use another stream's tensor takes an event between the two."""

import threading

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("accelerator")

RACE = "expected an event between two streams, got a race"


def made_on(stream: torch.Stream) -> Tensor:
    with torch.sim.stream(stream):
        return torch.ones(3, device=stream.device)


def test_a_tensor_of_another_stream_needs_an_event() -> None:
    side = torch.sim.Stream("sim:1")
    x = made_on(side)
    with pytest.raises(RuntimeError, match=f"{RACE}: add on the default stream of sim:1 reads .* wrote"):
        x + 1
    torch.sim.current_stream(1).wait_stream(side)
    assert (x + 1).tolist() == [2.0, 2.0, 2.0]


def test_an_event_covers_what_came_before_it_alone() -> None:
    side = torch.sim.Stream("sim:1")
    before = made_on(side)
    event = side.record_event()
    after = made_on(side)
    torch.sim.current_stream(1).wait_event(event)
    before + 1
    with pytest.raises(RuntimeError, match=RACE):
        after + 1


def test_an_event_is_recorded_and_waited_for_by_name() -> None:
    side = torch.sim.Stream(1)
    x = made_on(side)
    event = torch.sim.Event()
    event.record(side)
    event.wait(torch.sim.current_stream(1))
    x + 1


def test_an_order_carries_over_from_stream_to_stream() -> None:
    first, second = torch.sim.Stream("sim:0"), torch.sim.Stream("sim:1")
    x = made_on(first)
    second.wait_stream(first)
    torch.sim.current_stream(0).wait_stream(second)
    x + 1


def test_a_tensor_that_another_stream_reads_is_not_written_without_an_event() -> None:
    side = torch.sim.Stream("sim:1")
    x = torch.ones(3, device="sim:1")
    side.wait_stream(torch.sim.current_stream(1))
    with torch.sim.stream(side):
        x + 1
    with pytest.raises(RuntimeError, match=r"writes a tensor that stream .* of sim:1 read before"):
        x.add_(1)
    torch.sim.current_stream(1).wait_stream(side)
    x.add_(1)


def test_views_share_what_is_known_of_their_memory() -> None:
    x = made_on(torch.sim.Stream("sim:1"))
    with pytest.raises(RuntimeError, match=RACE):
        x[1:] + 1


def test_a_kernel_is_an_operator_as_any_other() -> None:
    side = torch.sim.Stream("sim:1")
    x = torch.rand(2, 3, device="sim:1")
    v = made_on(side)
    with pytest.raises(RuntimeError, match=f"{RACE}: batch_norm_elemt"):
        torch.batch_norm_elemt(x, None, None, v, v, 0.0)
    side.wait_stream(torch.sim.current_stream(1))
    with torch.sim.stream(side):
        y = torch.batch_norm_elemt(x, None, None, v, v, 0.0)
    with pytest.raises(RuntimeError, match=RACE):
        y + 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, side: side.synchronize(),
        lambda x, side: side.record_event().synchronize(),
        lambda x, side: torch.sim.synchronize("sim:1"),
    ],
)
def test_whatever_the_host_has_waited_for_comes_first(wait) -> None:
    side = torch.sim.Stream("sim:1")
    x = made_on(side)
    wait(x, side)
    x + 1


def test_a_read_by_the_host_is_ordered_by_the_current_stream() -> None:
    side = torch.sim.Stream("sim:1")
    x = made_on(side)
    with pytest.raises(RuntimeError, match=RACE):
        x.cpu()
    with torch.sim.stream(side):
        x.cpu()
    x + 1  # the host has waited


def test_a_copy_between_devices_orders_the_current_streams_of_both() -> None:
    x = torch.ones(3, device="sim:1")
    y = torch.zeros(3, device="sim:2").copy_(x)  # after the zeros
    (y + 1).to("sim:1").add_(x)


def test_a_copy_reads_on_the_current_stream_of_its_source() -> None:
    side = torch.sim.Stream("sim:1")
    x = made_on(side)
    with pytest.raises(RuntimeError, match="copy between devices on the default stream of sim:1 reads"):
        x.to("sim:2")
    torch.sim.set_stream(side)
    try:
        y = x.to("sim:2")
    finally:
        torch.sim.set_stream(torch.sim.default_stream(1))
    y + 1


def test_the_current_stream_is_that_of_a_device_and_a_thread() -> None:
    side = torch.sim.Stream("sim:1")
    seen: list[torch.Stream] = []
    with torch.sim.stream(side):
        assert torch.sim.current_stream() == torch.accelerator.current_stream() == side
        assert torch.sim.current_stream(2) == torch.sim.default_stream(2)
        thread = threading.Thread(target=lambda: seen.append(torch.sim.current_stream(1)))
        thread.start()
        thread.join(10.0)
        assert not thread.is_alive()
    assert seen == [torch.sim.default_stream(1)]
    assert torch.sim.current_stream(1) == torch.sim.default_stream(1)
    assert torch.sim.current_device() == 0


def test_what_wrote_to_memory_that_is_freed_is_forgotten() -> None:
    side = torch.sim.Stream("sim:1")
    for _ in range(50):  # the same blocks come again
        made_on(side)
        torch.ones(3, device="sim:1") + 1


def used_on_another_stream_and_freed(record: bool, wait: bool) -> None:
    side = torch.sim.Stream("sim:1")
    x = torch.ones(3, device="sim:1")
    side.wait_stream(torch.sim.current_stream(1))
    with torch.sim.stream(side):
        x + 1
    if record:
        x.record_stream(side)
    del x
    if wait:
        torch.sim.current_stream(1).wait_stream(side)


def test_memory_that_another_stream_still_uses_is_not_freed_without_a_record() -> None:
    used_on_another_stream_and_freed(record=False, wait=False)
    with pytest.raises(
        RuntimeError, match=r"may still use, since its memory was freed without record_stream"
    ):
        torch.ones(3, device="sim:1")
    torch.ones(3, device="sim:2")  # of another device, so other memory
    torch.sim.synchronize(1)
    torch.ones(3, device="sim:1")


@pytest.mark.parametrize(("record", "wait"), [(True, False), (False, True)])
def test_memory_may_be_freed_once_it_is_recorded_or_waited_for(record: bool, wait: bool) -> None:
    used_on_another_stream_and_freed(record, wait)
    torch.ones(3, device="sim:1") + 1


def test_the_engine_hands_a_gradient_over_from_device_to_device() -> None:
    x = torch.rand(3, device="sim:0", requires_grad=True)
    y = sum((x.to(f"sim:{i}") * (i + 1)).to("sim:3") for i in range(4))
    y.sum().backward()
    assert x.grad.tolist() == [10.0, 10.0, 10.0]


def test_the_engine_runs_a_node_on_the_stream_of_its_forward() -> None:
    side = torch.sim.Stream("sim:1")
    x = torch.rand(3, device="sim:1", requires_grad=True)
    y = x * 2
    side.wait_stream(torch.sim.current_stream(1))
    with torch.sim.stream(side):
        z = y.exp()
    torch.sim.current_stream(1).wait_stream(side)
    (z * 3).sum().backward()
    torch.testing.assert_close(x.grad, 6 * (2 * x.detach()).exp())


def test_a_node_that_uses_another_stream_without_an_event_fails_in_the_backward() -> None:
    side = torch.sim.Stream("sim:1")

    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            with torch.sim.stream(side):
                return dy * 2

    x = torch.rand(3, device="sim:1", requires_grad=True)
    y = Forgetful.apply(x)
    with pytest.raises(RuntimeError, match=f"{RACE}: mul"):
        (y * 2).sum().backward()


def test_the_checks_can_be_switched_off(accelerator) -> None:
    x = made_on(torch.sim.Stream("sim:1"))
    with accelerator.stream_checks(False):
        x + 1
    x = made_on(torch.sim.Stream("sim:1"))
    with pytest.raises(RuntimeError, match=RACE):
        x + 1
