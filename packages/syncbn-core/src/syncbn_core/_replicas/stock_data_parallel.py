"""Replicas that ``syncbn_parallel`` did not make: nothing says which of them belong together.

``torch.nn.parallel.replicate`` asks every module, one after the other, for all of its replicas in a row,
through ``_replicate_for_data_parallel()``. So the layers can count their replicas. The counts of one such
call give one group for all layers of that forward. A vendored ``sync_batchnorm`` folder gives the replicas of
each layer one context, which has no group: there, each layer gets a group of its own.

Nothing says when a replica fails, either. But each replica runs in a thread of its own: the end of that
thread is the end of the replica. If a replica has synchronized with the others once, they get an error as
soon as it ends. If it ends before that, they wait until the timeout.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import replicate as torch_replicate

from syncbn_comm import BrokenSyncError, ReplicaGroup
from syncbn_core._replicas.place import Master, Place

_REMEDY = "wrap the model in syncbn_parallel.DataParallelWithCallback or call patch_replication_callback"

# Private to torch; every backward and every autograd.grad goes through it.
_ENGINE_CALL = torch.autograd.graph._engine_run_backward.__code__

_MODULE_CALL = nn.Module._call_impl.__code__

Threads = weakref.WeakSet[threading.Thread]

_replicating = threading.local()  # .forward: weak, the forward that this thread makes replicas for
_running = threading.local()  # .attendance: of the replica that this thread runs


def enlist(layer: nn.Module, name: str, nested: bool) -> Place:
    """Count one more replica of ``layer``, and return its place among the others.

    Args:
        layer: the layer that is replicated; its ``_replicate_for_data_parallel()`` calls this.
        name: the layer's name, for error messages; need not be unique.
        nested: whether the layer is itself a replica.
    """
    previous = getattr(_replicating, "forward", None)
    forward = previous() if previous is not None else None
    if forward is None or forward.is_over(layer):
        forward = _Forward(_announced_replicas())
        _replicating.forward = weakref.ref(forward)
    return forward.enlist(layer, name, nested)


def _announced_replicas() -> int | None:
    """Return how many replicas torch's own loop is about to make; None if something else makes them."""
    # The frames: this function, enlist, _replicate_for_data_parallel, and the caller of that.
    frame = sys._getframe(3)
    if frame.f_code is not torch_replicate.__code__:
        return None
    announced: int | None = frame.f_locals.get("num_replicas")
    return announced


def in_a_stock_replica() -> bool:
    """Whether this thread runs a module that is a replica."""
    if threading.current_thread() is threading.main_thread():
        return False  # replicas run in threads of their own
    frames = _with_callers(sys._getframe(1))
    return any(f.f_code is _MODULE_CALL and "_is_replica" in vars(f.f_locals["self"]) for f in frames)


class _Forward:
    """The replicas of one forward; only the replicas keep this object alive."""

    def __init__(self, announced: int | None) -> None:
        self._announced = announced
        self._layers: dict[int, tuple[str, int]] = {}  # id of a layer -> its unique name, its replicas so far
        self._names: Counter[str] = Counter()  # how many layers have each name
        self._current = 0  # the id of the layer that is being replicated
        self.threads: Threads = weakref.WeakSet()  # that have run replicas
        self._group: ReplicaGroup | None = None
        self._lock = threading.Lock()

    @property
    def is_announced(self) -> bool:
        """Whether torch's own loop makes these replicas, so that they can be counted."""
        return self._announced is not None

    def is_over(self, layer: nn.Module) -> bool:
        """Whether a further replica of this layer must belong to the next forward."""
        if self._group is not None:
            return True
        if id(layer) not in self._layers:
            return False
        return id(layer) != self._current or self._layers[id(layer)][1] == self._announced

    def enlist(self, layer: nn.Module, name: str, nested: bool) -> Place:
        """Count one more replica of this layer."""
        if id(layer) not in self._layers:
            self._names[name] += 1
            number = self._names[name]
            self._layers[id(layer)] = (f"{name} ({number})" if number > 1 else name, 0)
        unique, rank = self._layers[id(layer)]
        self._layers[id(layer)] = (unique, rank + 1)
        self._current = id(layer)
        return StockPlace(self, rank, unique, nested)

    @property
    def group(self) -> ReplicaGroup:
        """All replicas; none can be added once one of them has asked.

        Raises:
            RuntimeError: they do not fit together.
        """
        with self._lock:
            if self._group is None:
                counts = {replicas for _, replicas in self._layers.values()}
                if len(counts | {self._announced or min(counts)}) > 1:
                    raise RuntimeError(
                        "expected the same number of replicas of every synchronized layer, got "
                        f"{dict(self._layers.values())}, so it is unknown which replicas belong to one "
                        f"forward: {_REMEDY}"
                    )
                self._group = ReplicaGroup(counts.pop())
            return self._group


class StockPlace(Place):
    """One replica's place among those that a stock ``nn.DataParallel`` made."""

    def __init__(self, forward: Any, rank: int, name: str, nested: bool) -> None:
        super().__init__(forward, rank, name, nested)
        self._threads: Threads = forward.threads
        self._caller = threading.get_ident()  # may run a replica, and the backward later

    def watch(self) -> Callable[[], bool]:
        """Return a function that tells whether a replica's own thread runs the present backward."""
        # A replica's thread ends with the replica, so what it differentiates belongs to its forward.
        return partial(_run_a_backward, self._threads)

    def meet(self, message: Any, master: Master) -> Any:
        """Synchronize with the other replicas; the end of this thread is the end of this replica."""
        group = self.group
        if threading.get_ident() != self._caller:
            self._threads.add(threading.current_thread())
        attendance = getattr(_running, "attendance", None)
        if group is not None and (attendance is None or attendance.group() is not group):
            _running.attendance = _Attendance(group, self.rank)
        try:
            return super().meet(message, master)
        except BrokenSyncError as error:
            error.add_note(
                f"a stock nn.DataParallel does not report why a replica ended; to see the reason, {_REMEDY}"
            )
            raise


def _run_a_backward(threads: Threads) -> bool:
    """Whether one of these threads runs a backward.

    On accelerators, nodes run in a thread of their device, while the thread that called the backward waits.
    """
    if threading.current_thread() in threads:
        return True
    own = {thread.ident for thread in threads if thread.is_alive()}
    return bool(own) and any(_is_in_backward(f) for ident, f in sys._current_frames().items() if ident in own)


def _is_in_backward(frame: FrameType) -> bool:
    """Whether a frame or one of its callers is the function of torch that runs the autograd engine."""
    return any(f.f_code is _ENGINE_CALL for f in _with_callers(frame))


def _with_callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


class _Attendance:
    """Exists in a thread as long as the replica that the thread runs."""

    def __init__(self, group: ReplicaGroup, rank: int) -> None:
        self.group = weakref.ref(group)
        self._rank = rank

    def __del__(self) -> None:
        group = self.group()
        if group is not None:
            group.member(self._rank).__exit__(None, None, None)


_by_context: weakref.WeakKeyDictionary[Any, dict[int, _ContextForward]] = weakref.WeakKeyDictionary()


def is_counted(place: Place | None) -> bool:
    """Whether torch's own loop made this replica, so that the replicas of a forward can be counted."""
    forward = place._forward if isinstance(place, StockPlace) else None
    return isinstance(forward, _Forward) and forward.is_announced


def enlist_by_context(layer: int, ctx: Any, copy_id: int, name: str, nested: bool) -> Place:
    """Return a replica's place by the context that all replicas of its layer share.

    Args:
        layer: a number for the layer of the replicated model.
        ctx: the context, of any class that supports weak references.
        copy_id: the replica's number.
        name: the layer's name, for error messages.
        nested: whether the layer was itself a replica.
    """
    forwards = _by_context.setdefault(ctx, {})
    forward = forwards.get(layer)
    if forward is None or forward.is_over(copy_id):
        forward = forwards[layer] = _ContextForward()
    forward.copies.add(copy_id)
    return StockPlace(forward, copy_id, name, nested)


class _ContextForward:
    """The replicas of one layer that got the same context."""

    def __init__(self) -> None:
        self.copies: set[int] = set()
        self.threads: Threads = weakref.WeakSet()
        self._group: ReplicaGroup | None = None
        self._lock = threading.Lock()

    def is_over(self, copy_id: int) -> bool:
        """Whether a further replica of this number must belong to the next forward."""
        return self._group is not None or copy_id in self.copies

    @property
    def group(self) -> ReplicaGroup:
        """All replicas; none can be added once one of them has asked."""
        with self._lock:
            if self._group is None:
                self._group = ReplicaGroup(max(self.copies) + 1)
            return self._group
