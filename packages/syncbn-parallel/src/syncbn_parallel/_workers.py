"""Lasting worker threads that run the replicas of one forward after the other.

A fresh thread per replica and forward would pay for a new OpenMP team every time. So threads are kept, process-wide, and lent
to a forward. A forward inside a worker borrows further ones: no job ever queues behind another, so none can wait
for one that has not begun.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from syncbn_parallel._sequence import raise_sequence_number, sequence_number


class Job:
    """One call on a worker thread; once it has ended, its ``result`` or the ``error`` that it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.started = False
        self.ended = threading.Lock()  # held until the worker has let go of this job
        self.ended.acquire()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        call = self._call
        del self._call  # it holds the arguments; the job may live on in a traceback
        try:
            self.result = call()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        with self.ended:
            pass


def run_all(
    calls: Sequence[Callable[[], Any]], share: int, on_interrupt: Callable[[BaseException], None]
) -> list[Job]:
    """Run every call at once, each on a worker thread of its own, and wait until the last one has ended.

    Args:
        calls: what to run.
        share: the number of intra-op threads that each call may use.
        on_interrupt: called in this thread with an exception that arrives while it waits (``KeyboardInterrupt``, say).
            It is to make the calls end; the exception is raised once they have. A second one is raised at once.

    Returns:
        The jobs, in the order of ``calls``. What a call raised is in its job.
    """
    jobs = [Job(call) for call in calls]
    workers = _pool.borrow(len(jobs), share)
    try:
        start = 0
        if torch.is_grad_enabled():
            start = max(sequence_number(), *(worker.sequence_number for worker in workers))
            raise_sequence_number(start)
        for worker, job in zip(workers, jobs):
            worker.start(job, start)
        for job in jobs:
            job.wait()
    except BaseException as interrupt:
        on_interrupt(interrupt)
        for worker, job in zip(workers, jobs):
            if job.started:
                job.wait()
            else:
                _pool.give_back(worker)
        raise
    return jobs


class _Worker:
    """One thread. It owes its number of intra-op threads to its birth: changing it tears an OpenMP team down."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.sequence_number = 0
        self._job: Job  # only from start() until the thread takes it
        self._start_number = 0
        self._wake = threading.Lock()
        self._wake.acquire()
        threading.Thread(target=self._run, name="syncbn-replica", daemon=True).start()

    def start(self, job: Job, sequence_number: int) -> None:
        self._job, self._start_number = job, sequence_number
        job.started = True  # directly before the call: nothing can interrupt between the two
        self._wake.release()

    def _run(self) -> None:
        _set_num_threads_of_this_thread(self.share)
        while True:
            self._wake.acquire()
            job = self._job
            del self._job
            raise_sequence_number(self._start_number)
            job.run()
            self.sequence_number = sequence_number()
            ended = job.ended
            del job  # nothing of a forward is kept alive by a thread that waits for the next one
            _pool.give_back(self)
            ended.release()


class _Pool:
    """The workers that have nothing to do, by their share of the intra-op threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: defaultdict[int, list[_Worker]] = defaultdict(list)

    def borrow(self, number: int, share: int) -> list[_Worker]:
        with self._lock:
            idle = self._idle[share]
            kept = max(len(idle) - number, 0)
            idle[kept:], workers = [], idle[kept:]
        return workers + [_Worker(share) for _ in range(number - len(workers))]

    def give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._idle[worker.share].append(worker)


_pool = _Pool()


def _forget_workers() -> None:
    """Start anew: of all threads only the one that called ``fork`` lives on in a child process."""
    global _pool
    _pool = _Pool()


os.register_at_fork(after_in_child=_forget_workers)

_setting_num_threads = threading.Lock()


def _set_num_threads_of_this_thread(number: int) -> None:
    """Set this thread's number of intra-op threads, and nobody else's.

    ``torch.set_num_threads`` also makes its number the one that later threads of the process begin with. A
    short-lived thread sets back what this one, being new, began with.
    """
    with _setting_num_threads:
        default = torch.get_num_threads()
        torch.set_num_threads(number)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()
