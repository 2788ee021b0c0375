"""Where the time of a training step over replicas goes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from syncbn_comm import ReplicaGroup
from syncbn_core._autograd import joined_node, one_node
from syncbn_core._kernels.cpu import CpuKernels
from syncbn_parallel import DataParallelWithCallback


class Clocks:
    """Where the time of a step goes, by name.

    Args:
        replicas: how many threads work side by side outside of this one.
    """

    def __init__(self, replicas: int) -> None:
        self.seconds: Counter[str] = Counter()
        self._replicas = replicas
        self._lock = threading.Lock()
        self._thread = threading.local()

    def on(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Add the time of each call to the name's."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.add(name, time.perf_counter() - start)

        return run

    def on_outermost(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same, unless a clock of this kind runs already in the thread that calls."""
        clocked = self.on(name, function)

        def run(*arguments: Any, **keywords: Any) -> Any:
            if getattr(self._thread, "runs", False):
                return function(*arguments, **keywords)
            self._thread.runs = True
            try:
                return clocked(*arguments, **keywords)
            finally:
                self._thread.runs = False

        return run

    def add(self, name: str, seconds: float) -> None:
        """Add a time that passed in this thread, while the others worked too or waited for it."""
        alone = threading.current_thread() is threading.main_thread()
        alone = alone or getattr(self._thread, "merges", False)
        with self._lock:
            self.seconds[name] += seconds if alone else seconds / self._replicas

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch what a step is made of."""
        replica = type(ReplicaGroup(1).member(0))
        exchange = replica.exchange

        def merging(combine: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                self._thread.merges = True
                try:
                    return combine(*arguments)
                finally:
                    self._thread.merges = False

            return self.on("merge", run)

        def clocked_exchange(self_: Any, message: Any, combine: Callable[..., Any], **keywords: Any) -> Any:
            return exchange(self_, message, merging(combine), **keywords)

        replicate = ("replication", DataParallelWithCallback, "replicate")
        kernels = [
            (CpuKernels, "local_statistics"),
            (CpuKernels, "merge"),
            (CpuKernels, "gradient_sums"),
            (CpuKernels, "normalize"),
            (CpuKernels, "input_gradient"),
            (one_node, "leave"),
            (joined_node, "train_forward"),
            (joined_node, "train_backward"),
        ]
        with ExitStack() as stack:
            for clock, (name, owner, function) in [
                (self.on, replicate),
                *((self.on_outermost, ("kernels", *kernel)) for kernel in kernels),
            ]:
                clocked = clock(name, getattr(owner, function))
                stack.enter_context(patch.object(owner, function, clocked))
            stack.enter_context(patch.object(replica, "exchange", self.on("meeting", clocked_exchange)))
            yield
        # One replica merges while the others wait for it; what it does there has been counted by itself.
        merging_time = self.seconds.pop("merge") * self._replicas
        self.seconds["hand-off, waiting"] = self.seconds.pop("meeting") - merging_time
