"""If a process dies, raises or calls another layer, the others get an error and do not hang."""

import os
import re
from unittest import mock

import pytest
import torch

from syncbn_comm import BrokenSyncError
from syncbn_core import SynchronizedBatchNorm2d
from syncbn_core._processes import collectives

GROUP_SECONDS = 5.0


def layers():
    return torch.nn.Sequential(*(SynchronizedBatchNorm2d(4) for _ in range(3)))


def train_until(world, event, phase):
    """Let an event happen in process 1 after two layers of the forward, or before its backward."""
    model, x = layers(), torch.randn(2, 4, 3, 3, requires_grad=True)
    y = model[:2](x)
    try:
        if phase == "backward":
            y = model[2](y)
        if world.rank == 1:
            happen(event)
        (y if phase == "backward" else model[2](y)).square().sum().backward()
    except BrokenSyncError as error:
        return str(error), type(error.__cause__).__name__, isinstance(error.__cause__, RuntimeError)


def happen(event):
    if event == "dies":
        os._exit(3)
    raise OSError("no such image")


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("event", ["dies", "raises"])
def test_the_others_get_an_error_that_names_the_layer(event, phase, new_processes):
    survivor, other = new_processes(2, GROUP_SECONDS).outcomes(train_until, event, phase)
    message, _, has_cause = survivor["result"]
    start = (
        f"process 0 (of 0 to 1) could not synchronize with the others in the {phase} "
        f"of 'SynchronizedBatchNorm2d' (call 1): "
    )
    assert message.startswith(start)
    assert len(message) > len(start)
    assert has_cause
    assert other is None if event == "dies" else "no such image" in other["error"]


CHECKED = {"SYNCBN_CHECK": "1"}


def named(kind, name):
    layer = kind(4)
    layer.layer_name = name  # as convert_model notes it
    return layer


def go_astray(world, way):
    first, second = (named(SynchronizedBatchNorm2d, name) for name in ("stem.bn", "head.bn"))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    try:
        if world.rank == 1 and way == "skips a layer":
            second(x)
        elif world.rank == 1 and way == "takes another order":
            second(first(second(x)))
        elif world.rank == 1 and way == "calls a layer once more":
            second(first(first(x)))
        else:
            second(first(x))
    except BrokenSyncError as error:
        return str(error)


@pytest.mark.parametrize(
    ("way", "where"),
    [
        ("skips a layer", ["the forward of 'stem.bn' (call 1)", "the forward of 'head.bn' (call 1)"]),
        ("takes another order", ["the forward of 'stem.bn' (call 1)", "the forward of 'head.bn' (call 1)"]),
        (
            "calls a layer once more",
            ["the forward of 'head.bn' (call 1)", "the forward of 'stem.bn' (call 2)"],
        ),
    ],
)
def test_the_check_reports_the_place_of_each_process(way, where, new_processes):
    errors = new_processes(2, GROUP_SECONDS, CHECKED).run(go_astray, way)
    sending = "sending 9 numbers of torch.float64"  # mean, m2 and count of 4 channels
    expected = (
        f"expected all processes at one place, got process 0 in {where[0]}, {sending}; "
        f"process 1 in {where[1]}, {sending}"
    )
    assert errors == [expected, expected]


def train_checked(world):
    layer = SynchronizedBatchNorm2d(4)
    for _ in range(2):
        layer(torch.randn(2, 4, 3, 3, requires_grad=True)).square().sum().backward()
    return layer.num_batches_tracked.item()


def test_the_check_accepts_correct_programs(new_processes):
    assert new_processes(2, GROUP_SECONDS, CHECKED).run(train_checked) == [2, 2]


def go_astray_with_sums(world, way):
    with mock.patch.object(collectives, "MANY", 2):
        return go_astray(world, way)


@pytest.mark.parametrize("way", ["skips a layer", "takes another order", "calls a layer once more"])
@pytest.mark.parametrize("run", [go_astray, go_astray_with_sums], ids=["gather", "sum"])
def test_processes_at_different_layers_of_one_width_get_an_error_without_the_check(run, way, processes):
    errors = processes(2).run(run, way)
    for error in errors:
        assert re.match(
            r"expected all processes in the forward of '(stem|head)\.bn' \(call \d\), got ", error
        )
        assert "at another layer or another call of it" in error
        assert "set SYNCBN_CHECK=1 to see where each process is" in error


def leave_one_backward_out(world, many):
    first, second = (named(SynchronizedBatchNorm2d, name) for name in ("stem.bn", "head.bn"))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with mock.patch.object(collectives, "MANY", many):
        y, z = first(x), second(x)
        try:
            (y if world.rank else z).square().sum().backward()
        except BrokenSyncError as error:
            return str(error)


@pytest.mark.parametrize("many", [2, 9], ids=["sum", "gather"])
def test_processes_in_the_backward_of_different_layers_get_an_error(many, processes):
    for error in processes(2).run(leave_one_backward_out, many):
        assert re.match(
            r"expected all processes in the backward of '(stem|head)\.bn' \(call 1\), got ", error
        )


def meet_another_width(world):
    layer = named(lambda _: SynchronizedBatchNorm2d(4 + world.rank), "bn")
    try:
        layer(torch.randn(2, 4 + world.rank, 3, 3))
    except BrokenSyncError as error:
        return str(error)


def test_the_check_compares_how_much_the_processes_send(new_processes):
    for error in new_processes(2, GROUP_SECONDS, CHECKED).run(meet_another_width):
        assert "process 0 in the forward of 'bn' (call 1), sending 9 numbers of torch.float64" in error
        assert "process 1 in the forward of 'bn' (call 1), sending 11 numbers of torch.float64" in error
