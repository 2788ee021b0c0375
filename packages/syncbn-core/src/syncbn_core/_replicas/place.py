"""One replica's place among the replicas of one forward, and how they synchronize."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from syncbn_comm import ReplicaGroup
from syncbn_core._replicas.recomputation import Agreements, in_backward


class Message(NamedTuple):
    """What a replica contributes if every replica has nodes of its own.

    Attributes:
        statistics: of its own batch: mean, m2 (on accelerators invstd), and possibly further rows.
        samples: the number of samples per channel.
        dtype: of its input.
        stream: the stream of its kernels, where its device has streams.
        in_grad_mode: whether the replica makes a graph.
    """

    statistics: Tensor
    samples: int
    dtype: torch.dtype
    stream: Any
    in_grad_mode: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor that the master reads."""
        return self.statistics


Master = Callable[[Sequence[tuple[int, Any]]], list[tuple[int, Any]]]
"""``[(rank, message), ...] -> [(rank, answer), ...]``, in replica 0's thread."""


class HasGroup(Protocol):
    """An object that knows the replicas of one forward."""

    @property
    def group(self) -> ReplicaGroup:
        """The replicas of this forward."""


class ReplicationContext(HasGroup, Protocol):
    """The part that a layer needs of the context that a replication callback gets."""

    @property
    def name(self) -> str:
        """The layer's qualified name in the model."""


class Place:
    """One replica's place among the replicas of one forward.

    Args:
        forward: knows the others, and is asked only when the layer runs; None if there are no others.
        rank: this replica's; 0 is the master.
        name: the place where they synchronize: the layer's name in the model.
        nested: whether the replicated layer was itself a replica.
    """

    def __init__(self, forward: HasGroup | None, rank: int, name: str, nested: bool = False) -> None:
        self.rank = rank
        self.name = name
        self.nested = nested
        self._forward = forward
        self._agreements = Agreements()

    @property
    def group(self) -> ReplicaGroup | None:
        """The replicas of this forward, where there are several."""
        group = self._forward.group if self._forward is not None else None
        return group if group is not None and group.world_size > 1 else None

    def agree(self, message: Message, master: Master, *, recomputable: bool) -> Tensor:
        """Synchronize with the other replicas, and return what they agree on.

        Inside a backward (a gradient checkpoint recomputes a part of this replica's forward) the replica does
        not wait for others: it returns what was agreed on in the forward.

        Args:
            message: this replica's.
            master: the function that answers all messages.
            recomputable: whether a recomputation saves the same tensors as the forward did.

        Raises:
            BrokenSyncError: another replica failed, finished early or did not arrive.
            RuntimeError: a recomputation cannot be right.
        """
        if in_backward():
            recalled = self._agreements.recall(message.statistics, self.name, recomputable)
            if recalled is not None:
                return recalled
        if self.nested:
            raise RuntimeError(
                f"expected one data-parallel wrapper around {self.name!r}, got one inside another: the "
                "layer would synchronize over the replicas of the inner wrapper only; give all devices to "
                "the outer one"
            )
        agreed = self.meet(message, master)
        if agreed is None:  # others have sent another kind of message, and send again
            agreed = self.meet(message, master)
        self._agreements.remember(message.statistics.detach(), agreed, keeps=self.group is not None)
        return cast(Tensor, agreed)

    def watch(self) -> Callable[[], bool]:
        """Return a function that tells whether a replica of this forward is still running.

        It keeps nothing alive.
        """
        group = self.group
        if group is None:
            return _never
        reference = weakref.ref(group)

        def is_running() -> bool:
            alive = reference()
            return alive is not None and bool(alive.active_ranks)

        return is_running

    def meet(self, message: Any, master: Master) -> Any:
        """Synchronize with the other replicas, and return the master's answer to this one."""
        if self.group is None:
            return master([(0, message)])[0][1]
        return self.group.member(self.rank).exchange(message, master, where=self.name)


def _never() -> bool:
    return False
