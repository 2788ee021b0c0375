"""The caller's OpenMP team, asleep while replicas run."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback, _data_parallel, _openmp
from syncbn_parallel._openmp import callers_team
from syncbn_parallel._workers import run_all

pytestmark = pytest.mark.skipif(
    _openmp._openmp is None or torch.get_num_threads() == 1, reason="there is no team to send to sleep"
)


@pytest.fixture(autouse=True)
def awake():
    """Each test begins and ends with a team that works."""
    assert works()
    yield
    callers_team.wake()
    assert works()


@pytest.fixture
def starts(monkeypatch):
    """Return a list that gets an entry each time that a team is sent to sleep."""
    found = []
    original = _openmp._openmp.start

    def start(*arguments):
        found.append(threading.get_ident())
        original(*arguments)

    monkeypatch.setattr(_openmp._openmp, "start", start)
    return found


def works():
    """Whether this thread is outside of all parallel regions, and those that it begins come to an end."""
    everything = torch.arange(2**20, dtype=torch.float64).sin()
    parts = torch.cat([part.sin() for part in torch.arange(2**20, dtype=torch.float64).split(2**12)])
    return _openmp._openmp.level() == 0 and torch.equal(everything, parts)


@contextmanager
def interrupt_after(function, monkeypatch):
    """Inside of the block, let an interrupt arrive directly after each call of one of OpenMP's functions."""
    original = getattr(_openmp._openmp, function)

    def interrupted(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_openmp._openmp, function, interrupted)
        yield


def test_a_team_sleeps_until_it_is_woken():
    callers_team.sleep()
    assert _openmp._openmp.level() == 1
    assert _openmp._openmp.team_size() == torch.get_num_threads()
    callers_team.wake()
    assert works()
    callers_team.wake()
    assert works()


def test_this_thread_can_work_while_its_team_sleeps():
    expected = torch.arange(2**20).sum()
    callers_team.sleep()
    assert torch.arange(2**20).sum() == expected


def test_each_thread_has_a_team_of_its_own():
    levels = []

    def other():
        callers_team.wake()
        callers_team.sleep()
        levels.append(_openmp._openmp.level())
        callers_team.wake()
        levels.append(_openmp._openmp.level())

    callers_team.sleep()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert levels == [1, 0]
    assert _openmp._openmp.level() == 1


@pytest.mark.parametrize("function", ["initialize", "start", "level"])
def test_an_interrupt_on_the_way_to_sleep_leaves_a_team_that_can_be_woken(function, monkeypatch):
    with interrupt_after(function, monkeypatch), pytest.raises(KeyboardInterrupt):
        callers_team.sleep()
    callers_team.wake()
    assert works()


@pytest.mark.parametrize("function", ["post", "end", "level"])
def test_an_interrupt_on_the_way_out_of_sleep_is_made_good_by_the_next_call(function, monkeypatch):
    callers_team.sleep()
    with interrupt_after(function, monkeypatch), pytest.raises(KeyboardInterrupt):
        callers_team.wake()
    callers_team.sleep()
    assert _openmp._openmp.level() == 1
    callers_team.wake()
    assert works()


def test_a_single_thread_is_no_team(starts):
    def alone():
        torch.set_num_threads(1)
        callers_team.sleep()
        callers_team.wake()

    threads = torch.get_num_threads()
    thread = threading.Thread(target=alone)
    thread.start()
    thread.join(60)
    torch.set_num_threads(threads)  # also what later threads begin with
    assert starts == []


def test_without_openmp_nothing_happens(monkeypatch):
    monkeypatch.setattr(_openmp, "_openmp", None)
    callers_team.sleep()
    callers_team.wake()


@pytest.mark.parametrize("missing", ["platform", "backend", "symbol"])
def test_elsewhere_no_openmp_is_found(missing, monkeypatch):
    if missing == "platform":
        monkeypatch.setattr(_openmp.sys, "platform", "darwin")
    elif missing == "backend":
        monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    else:
        monkeypatch.setattr(_openmp.ctypes, "CDLL", lambda name: object())
    assert _openmp._find_openmp() is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_leaves_openmp_alone():
    """A parallel region in it would wait for threads that only its parent has."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            callers_team.sleep()
            callers_team.wake()
            status = int(_openmp._openmp is not None)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_it_sleeps_while_calls_run_and_no_longer(fails, starts):
    def call():
        if fails:
            raise ValueError

    run_all([call] * 2, 1, on_interrupt=lambda error: None, rest=True)
    assert starts == [threading.get_ident()]
    assert works()


def test_an_interrupt_wakes_it():
    told = threading.Event()

    def call():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert told.wait(60)

    with pytest.raises(KeyboardInterrupt):
        run_all([call], 1, on_interrupt=lambda error: told.set(), rest=True)
    assert works()


class TestDataParallel:
    """It rests where that pays: beside replicas on the CPU, in training, if the last forward was long."""

    @pytest.fixture(autouse=True)
    def every_forward_is_long(self, monkeypatch):
        monkeypatch.setattr(_data_parallel, "_LONG", 0.0)

    def test_from_the_second_forward_on(self, starts):
        torch.manual_seed(0)
        model = DataParallelWithCallback(nn.Linear(64, 64), ["cpu"] * 2)
        x = torch.randn(512, 64)
        results = []
        for _ in range(3):
            model.zero_grad()
            y = model(x)
            (y * y.detach().cos()).sum().backward()
            results.append((y, model.module.weight.grad))
        assert len(starts) == 2
        for y, grad in results[1:]:
            assert torch.equal(y, results[0][0])
            assert torch.equal(grad, results[0][1])

    def test_not_after_a_short_one(self, starts, monkeypatch):
        monkeypatch.setattr(_data_parallel, "_LONG", float("inf"))
        model = DataParallelWithCallback(nn.Identity(), ["cpu"] * 2)
        for _ in range(3):
            model(torch.arange(4.0))
        assert starts == []

    def test_not_without_gradients(self, starts):
        model = DataParallelWithCallback(nn.Identity(), ["cpu"] * 2)
        with torch.no_grad():
            for _ in range(3):
                model(torch.arange(4.0))
        assert starts == []

    def test_not_where_another_device_does_the_work(self, starts):
        model = DataParallelWithCallback(nn.Identity(), ["meta"] * 2)
        for _ in range(3):
            model(torch.empty(4, device="meta"))
        assert starts == []

    def test_a_replica_that_fails_leaves_a_team_that_works(self, starts):
        class Picky(nn.Module):
            def forward(self, x):
                if x.max() > 3:
                    raise ValueError("too large")
                return x

        model = DataParallelWithCallback(Picky(), ["cpu"] * 2)
        model(torch.arange(2.0))
        with pytest.raises(ValueError, match="too large"):
            model(torch.arange(8.0))
        assert len(starts) == 1
        assert works()

    def test_one_inside_of_another(self, starts):
        inner = DataParallelWithCallback(nn.Identity(), ["cpu"] * 2)
        model = DataParallelWithCallback(nn.Sequential(inner), ["cpu"] * 2)
        x = torch.arange(8.0)
        for _ in range(3):
            assert torch.equal(model(x), x)
        assert threading.get_ident() in starts
