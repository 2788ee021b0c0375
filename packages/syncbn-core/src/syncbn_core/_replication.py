"""What one replica of a layer knows of the others: how to meet them, and what they agreed on."""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from syncbn_comm import ReplicaGroup


class Message(NamedTuple):
    """What a replica brings to a meeting.

    Attributes:
        statistics: ``(3, C)``: mean, m2 and count of its own batch.
        samples: that count, known to the host.
        dtype: of its input.
    """

    statistics: Tensor
    samples: int
    dtype: torch.dtype


Master = Callable[[Sequence[tuple[int, Message]]], list[tuple[int, Tensor]]]
"""``[(rank, message), ...] -> [(rank, mean_invstd), ...]``, in replica 0's thread."""


class HasGroup(Protocol):
    """Whatever knows the replicas of one forward."""

    @property
    def group(self) -> ReplicaGroup:
        """The replicas of this forward."""


class ReplicationContext(HasGroup, Protocol):
    """What a layer needs of the context that a replication callback is given."""

    @property
    def name(self) -> str:
        """The layer's qualified name in the model."""


class Replication:
    """One replica's place among the replicas of one forward, and its memory of what they agreed on.

    Args:
        forward: what knows the others, asked no earlier than the layer runs; None if there are none.
        rank: this replica's; 0 is the master.
        name: where they meet: the layer's name in the model.
        nested: whether the replicated layer was itself a replica.
    """

    def __init__(self, forward: HasGroup | None, rank: int, name: str, nested: bool = False) -> None:
        self.rank = rank
        self.name = name
        self.nested = nested
        self._forward = forward
        # The replica's own statistics, and what was agreed on as long as a graph remembers it.
        self._agreements: list[tuple[Tensor, weakref.ref[Tensor]]] = []

    @property
    def group(self) -> ReplicaGroup | None:
        """The replicas of this forward, where there are several."""
        group = self._forward.group if self._forward is not None else None
        return group if group is not None and group.world_size > 1 else None

    def agree(self, message: Message, master: Master, *, recomputable: bool) -> Tensor:
        """Meet the other replicas and return the ``(2, C)`` mean and invstd of the whole batch.

        Inside a backward (a gradient checkpoint recomputes a part of this replica's forward) nobody is met:
        the replica returns to what was agreed on in the forward.

        Args:
            message: this replica's.
            master: what becomes of all messages.
            recomputable: whether a recomputation saves the same tensors as the forward did.

        Raises:
            BrokenSyncError: another replica failed, left or did not come.
            RuntimeError: in a recomputation that cannot be right.
        """
        if _in_backward():
            agreed = self._recall(message, recomputable)
            if agreed is not None:
                return agreed
        if self.nested:
            raise RuntimeError(
                f"expected one data-parallel wrapper around {self.name!r}, got one inside of another: the "
                "layer could synchronize the replicas of the inner one alone; give all devices to the outer"
            )
        mean_invstd = self.meet(message, master)
        if mean_invstd.requires_grad:
            self._agreements = [a for a in self._agreements if a[1]() is not None]
            self._agreements.append((message.statistics.detach(), weakref.ref(mean_invstd)))
        return mean_invstd

    def meet(self, message: Message, master: Master) -> Tensor:
        """Meet the other replicas, for good or ill."""
        if self.group is None:
            return master([(0, message)])[0][1]
        return self.group.member(self.rank).exchange(message, master, where=self.name)

    @torch.no_grad()
    def _recall(self, message: Message, recomputable: bool) -> Tensor | None:
        if not recomputable:
            raise RuntimeError(
                f"expected {self.name!r} to run once, got a recomputation (gradient checkpointing) of a "
                "layer built with fused=False, whose graph spans all replicas: build it with fused=True, "
                "or leave it out of the checkpoint"
            )
        known = [(own, agreed) for own, ref in self._agreements if (agreed := ref()) is not None]
        if not known and self.group is not None:
            raise RuntimeError(
                f"expected {self.name!r} to be recomputed after a forward with gradients, got a "
                "recomputation of one without: torch.utils.checkpoint with use_reentrant=True runs the "
                "backward of every replica by itself, but synchronized layers need one graph for all "
                "replicas; pass use_reentrant=False"
            )
        if len(known) <= 1:
            return known[0][1].detach() if known else None
        # The layer was called several times in this forward. A recomputation repeats the numbers of the first
        # pass, so the replica's own statistics tell which call it is. They are compared on their device, so
        # that the host does not wait for it.
        distance = (torch.stack([own for own, _ in known]) - message.statistics).abs()  # (calls, 3, C)
        nearest = distance.flatten(1).amax(1).argmin().view(1)
        return torch.stack([agreed for _, agreed in known]).index_select(0, nearest)[0]


def _in_backward() -> bool:
    """Whether this thread is inside of a backward. Torch has no public way to ask."""
    return bool(torch._C._current_graph_task_id() != -1)
