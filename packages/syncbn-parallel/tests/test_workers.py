"""The lasting threads under the replicas."""

import gc
import os
import signal
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback
from syncbn_parallel._workers import run_all


def run(*calls, share=1):
    return run_all(calls, share, on_interrupt=lambda error: None)


def test_results_and_errors_come_back_in_order():
    error = KeyError("x")

    def fail():
        raise error

    first, second, third = run(lambda: 1, fail, lambda: 3)
    assert (first.result, second.result, third.result) == (1, None, 3)
    assert (first.error, second.error, third.error) == (None, error, None)


def test_threads_are_used_again():
    def idents():
        return {job.result for job in run(*[threading.get_ident] * 3, share=5)}

    first = idents()
    assert len(first) == 3
    assert all(idents() == first for _ in range(20))


def test_there_are_never_more_threads_than_calls_at_once(worker_count):
    run(*[int] * 6, share=7)
    before = worker_count()
    for number in (1, 6, 3, 2, 5, 4) * 20:
        run(*[int] * number, share=7)
    assert worker_count() == before


def test_a_call_inside_a_call_gets_further_threads():
    def outer():
        return {threading.get_ident(), *(job.result for job in run(*[threading.get_ident] * 2))}

    assert [len(job.result) for job in run(outer, outer)] == [3, 3]


def test_threads_that_call_at_once_share_no_worker():
    barrier = threading.Barrier(6)
    found = []

    def meet():
        barrier.wait(60)
        return threading.get_ident()

    callers = [
        threading.Thread(target=lambda: found.extend(job.result for job in run(*[meet] * 2)))
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert len(set(found)) == 6


class Thing:
    """Something that can be referenced weakly."""


@pytest.mark.parametrize("fails", [False, True])
def test_an_idle_thread_keeps_nothing_alive(fails):
    def call(thing):
        if fails:
            raise ValueError
        return Thing()

    thing = Thing()
    calls = [partial(call, thing)]
    (job,) = run_all(calls, 1, on_interrupt=lambda error: None)
    alive = weakref.ref(thing), weakref.ref(job), weakref.ref(job.result or thing)
    del calls, thing, job
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


@pytest.mark.usefixtures("interrupts_raise")
def test_an_interrupt_ends_the_calls_before_it_is_raised():
    """Ctrl-C while the caller waits: it is told first, then all calls end, then it propagates."""
    told, ended, running = threading.Event(), [], threading.Event()

    def call(number):
        if number == 0:
            running.wait(60)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        else:
            running.set()
        assert told.wait(60)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        run_all([partial(call, 0), partial(call, 1)], 1, on_interrupt=lambda error: told.set())
    assert sorted(ended) == [0, 1]
    assert run(threading.get_ident)[0].error is None


def test_an_interrupt_before_all_calls_have_begun_loses_no_thread(worker_count, monkeypatch):
    from syncbn_parallel import _workers

    run(*[int] * 4, share=9)
    before = worker_count()
    for started in range(4):
        starts = iter([True] * started)
        original = _workers._Worker.start

        def start(worker, job, number, starts=starts, original=original):
            if not next(starts, False):
                raise KeyboardInterrupt
            original(worker, job, number)

        with monkeypatch.context() as patch:
            patch.setattr(_workers._Worker, "start", start)
            with pytest.raises(KeyboardInterrupt):
                run(*[int] * 4, share=9)
        run(*[int] * 4, share=9)
    assert worker_count() == before


def test_a_thread_that_the_system_refuses_is_an_error_and_loses_no_other(worker_count, monkeypatch):
    run(*[int] * 2, share=11)
    before = worker_count()
    with monkeypatch.context() as patch:
        patch.setattr(
            threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("refused"))
        )
        with pytest.raises(RuntimeError, match="refused"):
            run(*[int] * 4, share=11)
    run(*[int] * 2, share=11)
    assert worker_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own():
    model = DataParallelWithCallback(nn.Identity(), ["cpu"] * 2)
    expected = model(torch.arange(4.0))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = int(not torch.equal(model(torch.arange(4.0)), expected))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
