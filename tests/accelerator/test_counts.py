"""What counts: launches, copies and reads by the host, each once; views and allocations are free."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

ONE_LAUNCH: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda x, v: x + 1,
    "add in place": lambda x, v: x.add_(1),
    "add into a tensor": lambda x, v: torch.add(x, x, out=x),
    "addcmul": lambda x, v: torch.addcmul(x, x, x),
    "addcmul in place": lambda x, v: x.addcmul_(x, x),
    "cat": lambda x, v: torch.cat([x, x]),
    "stack": lambda x, v: torch.stack([x, x]),
    "zeros": lambda x, v: torch.zeros(3, device="sim:0"),
    "zeros_like": lambda x, v: torch.zeros_like(x),
    "full": lambda x, v: x.new_full((3,), 2.0),
    "fill in place": lambda x, v: x.fill_(2.0),
    "lerp in place": lambda x, v: x.lerp_(x, 0.1),
    "rsqrt": lambda x, v: x.rsqrt(),
    "sum": lambda x, v: x.sum((0, 2, 3)),
    "clone": lambda x, v: x.clone(),
    "to another dtype": lambda x, v: x.double(),
    "to another layout": lambda x, v: x.contiguous(memory_format=torch.channels_last),
    "to another device": lambda x, v: x.to("sim:3"),
    "copy into a row": lambda x, v: torch.empty(2, 3, device="sim:1")[1].copy_(v),
    "from the host": lambda x, v: torch.ones(3).to("sim:1", non_blocking=True),
    "batch_norm_stats": lambda x, v: torch.batch_norm_stats(x, 0.0),
    "batch_norm_elemt": lambda x, v: torch.batch_norm_elemt(x, v, v, v, v, 0.0),
    "batch_norm_elemt into a tensor": lambda x, v: torch.batch_norm_elemt(x, v, v, v, v, 0.0, out=x),
    "batch_norm_backward_reduce": lambda x, v: torch.batch_norm_backward_reduce(
        x, x, v, v, v, True, True, True
    ),
}

FREE: dict[str, Callable[[Tensor], object]] = {
    "empty": lambda x: torch.empty(3, device="sim:1"),
    "empty_like": lambda x: torch.empty_like(x),
    "view": lambda x: x.view(-1),
    "reshape": lambda x: x.reshape(2, -1),
    "unbind": lambda x: x.unbind(),
    "split": lambda x: x.split(1),
    "a row": lambda x: x[1],
    "transpose": lambda x: x.transpose(0, 1),
    "expand": lambda x: x[:1].expand_as(x),
    "detach": lambda x: x.detach(),
    "the device and dtype that it has": lambda x: x.to(x.device, x.dtype),
}


@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_counts_once(name: str, accelerator) -> None:
    x, v = torch.rand(2, 3, 4, 4, device="sim:1"), torch.rand(3, device="sim:1")
    with accelerator.counted() as counts:
        ONE_LAUNCH[name](x, v)
    assert (counts.total, counts.reads, counts.waits) == (1, 0, 0), counts


@pytest.mark.parametrize("name", FREE)
def test_is_free(name: str, accelerator) -> None:
    x = torch.rand(2, 3, 4, 4, device="sim:1")
    with accelerator.counted() as counts:
        FREE[name](x)
    assert counts == {}


@pytest.mark.parametrize(
    ("read", "launches"),
    [
        (lambda x: x[0].item(), 0),
        (lambda x: bool(x[0]), 0),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu", non_blocking=True), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 3),  # as nn.SyncBatchNorm does to leave out empty shards
    ],
)
def test_a_value_or_a_size_that_the_host_needs_is_a_read(read, launches: int, accelerator) -> None:
    x = torch.rand(3, device="sim:1")
    with accelerator.counted() as counts:
        read(x)
    assert (counts.total, counts.reads, counts.waits) == (launches, 1, 0), counts


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.ones(3).to("sim:1"),
        lambda: torch.sim.synchronize(),
        lambda: torch.sim.current_stream(1).synchronize(),
    ],
)
def test_a_host_that_waits_otherwise_is_told_apart(wait, accelerator) -> None:
    with accelerator.counted() as counts:
        wait()
    assert (counts.reads, counts.waits) == (0, 1), counts


def test_what_backward_threads_launch_is_counted(accelerator) -> None:
    x = torch.rand(3, device="sim:2", requires_grad=True)
    y, weights = x * 2, torch.rand(3, device="sim:2")
    with accelerator.counted() as counts:
        y.backward(weights)
    assert counts == {"mul": 1}
