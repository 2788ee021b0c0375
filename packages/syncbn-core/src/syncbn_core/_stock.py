"""Replicas made by a stock ``nn.DataParallel``, which tells nobody who belongs together.

``torch.nn.parallel.replicate`` asks every module, one after the other, for all of its replicas in a row,
through ``_replicate_for_data_parallel()``. So the layers can count. From the counts of one such call comes
one group for all layers of that forward.

Nobody says when a replica fails, either. But torch runs each replica in a thread of its own: the end of that
thread is the end of the replica, and a replica that has met the others once is missed as soon as it ends.
One that ends before is waited for until the time-out.
"""

import sys
import threading
import weakref
from typing import Any

from torch import nn
from torch.nn.parallel import replicate as torch_replicate

from syncbn_comm import BrokenSyncError, ReplicaGroup

from ._replication import Master, Replication

_REMEDY = "wrap the model in syncbn_parallel.DataParallelWithCallback or call patch_replication_callback"

_replicating = threading.local()  # .forward: weak, the forward that this thread makes replicas for
_running = threading.local()  # .attendance: of the replica that this thread runs


def enlist(layer: nn.Module, name: str, nested: bool) -> Replication:
    """Count one more replica of ``layer``, and return its place among the others.

    Args:
        layer: what the replica is one of; its ``_replicate_for_data_parallel()`` calls this.
        name: the layer's, for error messages; need not be unique.
        nested: whether the layer is itself a replica.
    """
    previous = getattr(_replicating, "forward", None)
    forward = previous() if previous is not None else None
    if forward is None or forward.is_over(layer):
        forward = _Forward(_announced_replicas())
        _replicating.forward = weakref.ref(forward)
    return forward.enlist(layer, name, nested)


def _announced_replicas() -> int | None:
    """How many replicas torch's own loop is about to make, where it is the one that asks."""
    # This function, enlist, _replicate_for_data_parallel, and who called that.
    frame = sys._getframe(3)
    if frame.f_code is not torch_replicate.__code__:
        return None
    announced: int | None = frame.f_locals.get("num_replicas")
    return announced


class _Forward:
    """The replicas of one forward, kept alive by nothing but themselves."""

    def __init__(self, announced: int | None) -> None:
        self._announced = announced
        self._layers: dict[int, tuple[str, int]] = {}  # id of a layer -> its unique name, its replicas so far
        self._current = 0  # the id of the layer that is being replicated
        self._group: ReplicaGroup | None = None
        self._lock = threading.Lock()

    def is_over(self, layer: nn.Module) -> bool:
        """Whether a further replica of this layer must belong to the next forward."""
        if self._group is not None:
            return True
        if id(layer) not in self._layers:
            return False
        return id(layer) != self._current or self._layers[id(layer)][1] == self._announced

    def enlist(self, layer: nn.Module, name: str, nested: bool) -> Replication:
        """Count one more replica of this layer."""
        if id(layer) not in self._layers:
            taken = sum(known == name or known.startswith(f"{name} (") for known, _ in self._layers.values())
            self._layers[id(layer)] = (f"{name} ({taken + 1})" if taken else name, 0)
        unique, rank = self._layers[id(layer)]
        self._layers[id(layer)] = (unique, rank + 1)
        self._current = id(layer)
        return StockReplication(self, rank, unique, nested)

    @property
    def group(self) -> ReplicaGroup:
        """All replicas, taken for complete as soon as one of them asks.

        Raises:
            RuntimeError: they do not fit together.
        """
        with self._lock:
            if self._group is None:
                counts = {replicas for _, replicas in self._layers.values()}
                if len(counts | {self._announced or min(counts)}) > 1:
                    raise RuntimeError(
                        "expected as many replicas of every synchronized layer, got "
                        f"{dict(self._layers.values())}; which of them belong to one forward cannot be told: "
                        + _REMEDY
                    )
                self._group = ReplicaGroup(counts.pop())
            return self._group


class StockReplication(Replication):
    """One replica's place among those that a stock ``nn.DataParallel`` made."""

    def meet(self, message: Any, master: Master) -> Any:
        """Meet the other replicas, with this thread's end as the end of this one."""
        group = self.group
        attendance = getattr(_running, "attendance", None)
        if group is not None and (attendance is None or attendance.group() is not group):
            _running.attendance = _Attendance(group, self.rank)
        try:
            return super().meet(message, master)
        except BrokenSyncError as error:
            error.add_note("a stock nn.DataParallel tells no one why a replica ended; to see it, " + _REMEDY)
            raise


class _Attendance:
    """Lives in a thread as long as the replica that the thread runs."""

    def __init__(self, group: ReplicaGroup, rank: int) -> None:
        self.group = weakref.ref(group)
        self._rank = rank

    def __del__(self) -> None:
        group = self.group()
        if group is not None:
            group.member(self._rank).__exit__(None, None, None)
