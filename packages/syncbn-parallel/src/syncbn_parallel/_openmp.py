"""The calling thread's OpenMP team, asleep while replicas run.

A thread of a team that waits for work spins, by default for milliseconds, and meanwhile holds a core. After
a backward these are the threads of the thread that calls the next forward, and its replicas want those cores.
So the team is given work, and that is to wait for a semaphore: it sleeps, and afterwards is at hand again.

The calls are those that a compiler makes for a parallel region, of GNU's OpenMP; LLVM's and Intel's have them
too. Where they or the semaphores of POSIX are missing, nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading

import torch

_SIZE_OF_SEMAPHORE = 128  # bytes; no system's is larger


class _OpenMP:
    """The functions of the OpenMP that torch uses."""

    def __init__(self) -> None:
        quick, slow = ctypes.PyDLL(None), ctypes.CDLL(None)  # which keep Python's global lock, or let it go
        address, number = ctypes.c_void_p, ctypes.c_uint
        self.wait_for = ctypes.cast(quick.sem_wait, address)
        self.level = quick.omp_get_level
        self.team_size = quick.omp_get_num_threads
        self.start, self.end = quick.GOMP_parallel_start, slow.GOMP_parallel_end
        self.initialize, self.post = quick.sem_init, quick.sem_post
        for function, arguments in [
            (self.start, (address, address, number)),
            (self.end, ()),
            (self.initialize, (address, ctypes.c_int, number)),
            (self.post, (address,)),
        ]:
            function.argtypes = arguments
        self.start.restype = self.end.restype = None


class _Team(threading.local):
    """The team of the thread that looks at it; it exists from that thread's first parallel region on."""

    def __init__(self) -> None:
        self._semaphore = ctypes.create_string_buffer(_SIZE_OF_SEMAPHORE)
        self._may_sleep = False

    def sleep(self) -> None:
        """Send the team to sleep, if there is one. Until `wake` this thread has nobody to help it."""
        if _openmp is None or torch.get_num_threads() == 1:
            return
        if _openmp.level() != 0:  # inside a parallel region; perhaps of an earlier call, left by an exception
            return
        semaphore = ctypes.addressof(self._semaphore)
        _openmp.initialize(semaphore, 0, 0)
        self._may_sleep = True
        _openmp.start(_openmp.wait_for, semaphore, 0)

    def wake(self) -> None:
        """Wake the team if it sleeps; if an exception interrupts that, the next call does."""
        if not self._may_sleep:
            return
        # Asked of OpenMP itself: a signal handler may have raised directly after a call of it.
        if _openmp is not None and _openmp.level() != 0:
            for _ in range(_openmp.team_size() - 1):
                _openmp.post(ctypes.addressof(self._semaphore))
            _openmp.end()
        self._may_sleep = False


def _find_openmp() -> _OpenMP | None:
    # Elsewhere there are no semaphores without a name.
    if sys.platform != "linux" or not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        return _OpenMP()
    except AttributeError:
        return None


def _forget_openmp() -> None:
    """Leave it alone in a child process, where GNU's waits for ever for threads that are not there."""
    global _openmp
    _openmp = None


_openmp = _find_openmp()
callers_team = _Team()

if _openmp is not None:
    os.register_at_fork(after_in_child=_forget_openmp)
