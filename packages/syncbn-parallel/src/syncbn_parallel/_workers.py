"""Threads that run the replicas and are kept.

A new thread per replica and forward would start a new OpenMP team each time. So the process keeps its threads
and lends them out. A forward inside one of them borrows further threads. No call is ever queued behind
another one, so no call can wait for one that has not begun.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from syncbn_parallel._sequence_numbers import raise_sequence_number, sequence_number

_SLICE = 0.5  # seconds


class Job:
    """A call on a worker thread. After the call, it has a ``result``, or the ``error`` that was raised."""

    def __init__(self, call: Callable[[], Any], among: _Unfinished) -> None:
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.started = False
        self.among = among

    def run(self, start_number: int) -> None:
        """Make the call; its autograd nodes are numbered from ``start_number``."""
        try:
            raise_sequence_number(start_number)
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def take_error(self) -> BaseException | None:
        """Return what the call has raised, and keep no reference to it."""
        error, self.error = self.error, None
        return error


class _Unfinished:
    """Counts the calls of one forward that have not ended, and waits for the last one."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._lock = threading.Lock()
        self._none = threading.Lock()  # held while a call runs
        self._none.acquire()

    def end(self) -> None:
        """Count one call as ended."""
        with self._lock:
            self._number -= 1
            if self._number == 0:
                self._none.release()

    def wait(self) -> None:
        """Wait until all calls have ended: a single wait for all of them."""
        # In slices: a signal that arrives just before a wait begins does not end it.
        while self._number:
            self._none.acquire(True, _SLICE)


def run_all(
    calls: Sequence[Callable[[], Any]],
    share: int,
    on_interrupt: Callable[[BaseException], None],
) -> list[Job]:
    """Make all calls at once, each on its own worker thread, and wait until the last one has ended.

    Args:
        calls: what to run.
        share: the number of intra-op threads that each call may use.
        on_interrupt: called with an exception that reaches this thread while it waits
            (``KeyboardInterrupt``). It has to make the calls end. Then the exception is raised. A second
            exception is raised at once.

    Returns:
        The jobs, in the order of ``calls``. What a call has raised is in its job.
    """
    unfinished = _Unfinished(len(calls))
    jobs = [Job(call, unfinished) for call in calls]
    workers = _pool.borrow(len(jobs), share)
    try:
        start = 0
        if torch.is_grad_enabled():
            start = max(sequence_number(), *(worker.sequence_number for worker in workers))
            raise_sequence_number(start)
        for worker, job in zip(workers, jobs):
            worker.start(job, start)
        unfinished.wait()
    except BaseException as interrupt:
        on_interrupt(interrupt)
        for worker, job in zip(workers, jobs):
            if not job.started:
                _pool.give_back(worker)
                unfinished.end()
        unfinished.wait()
        raise
    return jobs


class _Worker:
    """A thread for one job at a time."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.sequence_number = 0
        self._start_number = 0
        self._job: Job  # from start() until the thread takes it
        self._wake = threading.Lock()
        self._wake.acquire()
        threading.Thread(target=self._run, name="syncbn-replica", daemon=True).start()

    def start(self, job: Job, start_number: int) -> None:
        self._job, self._start_number = job, start_number
        job.started = True  # directly before the release, so that no signal handler runs in between
        self._wake.release()

    def _run(self) -> None:
        _pool.limit_this_thread(self.share)
        while True:
            self._wake.acquire()
            job = self._job
            del self._job
            job.run(self._start_number)
            self.sequence_number = sequence_number()
            unfinished = job.among
            del job  # otherwise this waiting thread would keep the last forward alive
            _pool.give_back(self)
            unfinished.end()
            del unfinished


class _Pool:
    """The idle workers, by their number of intra-op threads.

    A worker keeps the number that it began with, because a change tears down the thread's OpenMP team.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limiting = threading.Lock()
        self._idle: defaultdict[int, list[_Worker]] = defaultdict(list)

    def borrow(self, number: int, share: int) -> list[_Worker]:
        with self._lock:
            idle = self._idle[share]
            workers = [idle.pop() for _ in range(min(number, len(idle)))]
        try:
            while len(workers) < number:
                workers.append(_Worker(share))
        except BaseException:  # the system may refuse a thread
            for worker in workers:
                self.give_back(worker)
            raise
        return workers

    def give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._idle[worker.share].append(worker)

    def limit_this_thread(self, share: int) -> None:
        """Set the number of intra-op threads of this new thread, and of no other.

        ``torch.set_num_threads`` also sets the number with which every later thread of the process begins. So
        another new thread sets this back to what it was.
        """
        with self._limiting:
            default = torch.get_num_threads()
            torch.set_num_threads(share)
            restorer = threading.Thread(target=torch.set_num_threads, args=(default,))
            restorer.start()
            restorer.join()


_pool = _Pool()


def _forget_workers() -> None:
    """Start with no workers in a child process, which has only the thread that called ``fork``."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_forget_workers)
