"""What one replica of a layer knows of the others: how to meet them, and what they agreed on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from syncbn_comm import ReplicaGroup
from torch import Tensor


class ReplicationContext(Protocol):
    """What a layer needs of the context that a replication callback is given.

    Attributes:
        name: the layer's qualified name in the model.
        group: the replicas of this forward.
    """

    name: str
    group: ReplicaGroup


class Message(NamedTuple):
    """What a replica brings to a meeting.

    Attributes:
        statistics: ``(3, C)``: mean, m2 and count of its own batch.
        count: samples per channel, known to the host.
        dtype: of its input.
    """

    statistics: Tensor
    count: int
    dtype: torch.dtype


Master = Callable[[Sequence[tuple[int, Message]]], Sequence[tuple[int, Tensor]]]


class _Agreement(NamedTuple):
    statistics: Tensor  # (3, C), the replica's own
    mean_invstd: Tensor  # (2, C), everybody's
    with_graph: bool


class Replication:
    """One replica's place among the replicas of one forward.

    Args:
        group: the replicas of this forward.
        rank: this replica's; 0 is the master.
        name: where they meet: the layer's name in the model.
    """

    def __init__(self, group: ReplicaGroup, rank: int, name: str) -> None:
        self.group = group
        self.rank = rank
        self.name = name
        self._agreements: list[_Agreement] = []

    def agree(self, message: Message, master: Master) -> Tensor:
        """Meet the other replicas and return the ``(2, C)`` mean and invstd of the whole batch.

        Inside a backward (a gradient checkpoint recomputes a part of this replica's forward) nobody is met: the
        replica returns to what was agreed on in the forward.

        Raises:
            BrokenSyncError: another replica failed, left or did not come.
            RuntimeError: in a recomputation that cannot be right.
        """
        if _in_backward():
            return self._recall(message.statistics)
        mean_invstd: Tensor = self.group.member(self.rank).exchange(message, master, where=self.name)
        self._agreements.append(
            _Agreement(message.statistics.detach(), mean_invstd.detach(), torch.is_grad_enabled())
        )
        return mean_invstd

    def _recall(self, statistics: Tensor) -> Tensor:
        candidates = [a for a in self._agreements if a.with_graph]
        if not candidates:
            raise RuntimeError(
                f"expected {self.name!r} to be recomputed after a forward with gradients, got a recomputation of one "
                "without: torch.utils.checkpoint with use_reentrant=True runs every replica's backward by itself, but "
                "synchronized layers need one graph for all replicas; pass use_reentrant=False"
            )
        if len(candidates) == 1:
            return candidates[0].mean_invstd
        # The layer was called several times in this forward. A recomputation repeats the numbers of the first
        # pass, so the replica's own statistics tell which call it is; compared on the device, no synchronization.
        own = torch.stack([a.statistics for a in candidates])
        distance = (own - statistics).abs().flatten(1).amax(1)
        which = distance.argmin().view(1)
        return torch.stack([a.mean_invstd for a in candidates]).index_select(0, which)[0]


def _in_backward() -> bool:
    """Whether this thread is inside of a backward. Torch has no public way to ask."""
    current: Any = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
    return bool(current != -1)
