"""Threads that run one at a time, and locks at which a seeded choice decides which thread runs next.

The threads are real, and so is all code under test; only its locks are replaced. At every lock operation the
running thread picks the next thread among those that can run, and passes it a baton. If none can run, the
schedule has a deadlock, which is found at once.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeAlias

import pytest

from syncbn_comm import _locks, _rendezvous

TraceFunction: TypeAlias = Callable[[FrameType, str, Any], Any]

# Stops only a broken scheduler: a deadlock of a schedule is found without a clock.
STUCK_SECONDS = 60.0


@pytest.fixture(scope="module")
def lasting_scheduler() -> Iterator[Scheduler]:
    made = Scheduler(workers=4)
    yield made
    made.close()


@pytest.fixture
def scheduler(lasting_scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """A scheduler that controls every lock that syncbn_comm makes during the test."""
    monkeypatch.setattr(_locks, "new_lock", lasting_scheduler.new_lock)
    return lasting_scheduler


class Hang(BaseException):
    """Raised in every thread of a schedule in which nobody can go on."""


class _Worker:
    """A lasting thread; it runs one job per schedule, whenever it holds the baton."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.baton = threading.Lock()
        self.baton.acquire()
        self.job: Callable[[], None] | None = None
        self.waits_for: ControlledLock | None = None
        self.can_time_out = False
        self.thread = threading.Thread(target=self._run, args=(scheduler,), daemon=True)
        self.thread.start()

    def _run(self, scheduler: Scheduler) -> None:
        while True:
            self.baton.acquire()
            if self.job is None:
                return
            if scheduler.every_line:
                sys.settrace(scheduler.trace)
            try:
                self.job()
            except BaseException as error:  # for the test's own thread, which waits for all jobs to end
                scheduler.crash = scheduler.crash or error
            sys.settrace(None)
            scheduler.end(self)


class ControlledLock:
    """Looks like a ``threading.Lock``; every operation on it lets the scheduler choose who goes on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        scheduler = self._scheduler
        worker = scheduler.running
        scheduler.choose()
        while self.held and not scheduler.hung:
            worker.waits_for = self
            worker.can_time_out = timeout >= 0 and scheduler.timeouts > 0
            scheduler.choose()
            worker.waits_for = None
            if worker.can_time_out and scheduler.expired is worker:
                scheduler.expired = None
                return False
        self.held = True
        return True

    def release(self) -> None:
        if not self.held and not self._scheduler.hung:
            raise RuntimeError("release unlocked lock")
        self.held = False
        self._scheduler.choose()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class Scheduler:
    """Runs jobs in lasting threads, one at a time, in an order that the seed alone decides."""

    def __init__(self, workers: int) -> None:
        self.running: _Worker | None = None
        self.expired: _Worker | None = None
        self.hung = False
        self.crash: BaseException | None = None
        self.timeouts = 0.0
        self.every_line = False
        self._active: list[_Worker] = []
        self._ended = threading.Lock()
        self._ended.acquire()
        self._workers = [_Worker(self) for _ in range(workers)]

    def new_lock(self) -> ControlledLock:
        """Stand in for ``threading.Lock``."""
        return ControlledLock(self)

    def run(
        self,
        seed: int,
        jobs: list[Callable[[], None]],
        timeouts: float = 0.0,
        every_line: bool = False,
    ) -> None:
        """Run the jobs to their ends.

        Args:
            seed: decides the order.
            jobs: one per thread.
            timeouts: how likely, at every step, a wait with a time limit ends by it.
            every_line: choose who goes on at every line of the rendezvous too, not only at its locks.

        Raises:
            Hang: nobody could go on.
            BaseException: what a job raised.
        """
        self._random = random.Random(seed).random
        self.hung, self.timeouts, self.expired, self.crash = False, timeouts, None, None
        self.every_line = every_line
        self._active = self._workers[: len(jobs)]
        for worker, job in zip(self._active, jobs, strict=True):
            worker.job, worker.waits_for = job, None
        self._next().baton.release()
        if not self._ended.acquire(timeout=STUCK_SECONDS):
            raise RuntimeError(f"the scheduler itself is stuck at seed {seed}")
        self.running = None
        if self.crash:
            self.crash.add_note(f"at seed {seed}")
            raise self.crash

    def choose(self) -> None:
        """Let somebody go on, perhaps the running thread itself."""
        worker = self.running
        if worker is None:  # set up by the test's own thread
            return
        chosen = self._next()
        if chosen is not worker:
            chosen.baton.release()
            worker.baton.acquire()
        if self.hung and worker.waits_for:
            raise Hang

    def trace(self, frame: FrameType, event: str, arg: object) -> TraceFunction | None:
        """Trace the lines of the rendezvous, and let somebody go on at each."""
        if frame.f_code.co_filename != _rendezvous.__file__:
            return None
        if event == "line":
            self.choose()
        return self.trace

    def end(self, worker: _Worker) -> None:
        """Take a thread whose job is done out of the schedule."""
        self._active = [other for other in self._active if other is not worker]
        (self._next().baton if self._active else self._ended).release()

    def close(self) -> None:
        """End the threads."""
        for worker in self._workers:
            worker.job = None
            worker.baton.release()
            worker.thread.join(STUCK_SECONDS)
            assert not worker.thread.is_alive()

    def _next(self) -> _Worker:
        active = self._active
        ready = active
        if not self.hung:
            ready = [worker for worker in active if worker.waits_for is None or not worker.waits_for.held]
            if self.timeouts and (not ready or self._random() < self.timeouts):
                waiting = [worker for worker in active if worker.waits_for and worker.can_time_out]
                if waiting:
                    self.expired = waiting[int(self._random() * len(waiting))]
                    ready = [self.expired]
            if not ready:
                self.hung, ready = True, active
        self.running = ready[int(self._random() * len(ready))]
        return self.running
