"""What one replica of a layer knows of the others: how to meet them, and what they agreed on."""

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


class _Agreement(NamedTuple):
    statistics: Tensor  # (3, C), the replica's own
    mean_invstd: Tensor  # (2, C), everybody's
    with_graph: bool


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
    """One replica's place among the replicas of one forward.

    Args:
        forward: what knows them; asked no earlier than the layer runs.
        rank: this replica's; 0 is the master.
        name: where they meet: the layer's name in the model.
        nested: whether the replicated layer was itself a replica.
    """

    def __init__(self, forward: HasGroup, rank: int, name: str, nested: bool = False) -> None:
        self.rank = rank
        self.name = name
        self._forward = forward
        self.nested = nested
        self._agreements: list[_Agreement] = []

    @property
    def world_size(self) -> int:
        """The number of replicas in this forward."""
        return self._forward.group.world_size

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
            if not recomputable:
                raise RuntimeError(
                    f"expected {self.name!r} to run once, got a recomputation (gradient checkpointing) of a "
                    "layer built with fused=False, whose graph spans all replicas: build it with fused=True, "
                    "or leave it out of the checkpoint"
                )
            return self._recall(message)
        if self.nested:
            raise RuntimeError(
                f"expected one data-parallel wrapper around {self.name!r}, got one inside of another: the "
                "layer could synchronize the replicas of the inner one alone; give all devices to the outer"
            )
        mean_invstd = self.meet(message, master)
        self._agreements.append(
            _Agreement(message.statistics.detach(), mean_invstd.detach(), torch.is_grad_enabled())
        )
        return mean_invstd

    def meet(self, message: Message, master: Master) -> Tensor:
        """Meet the other replicas, for good or ill."""
        return self._forward.group.member(self.rank).exchange(message, master, where=self.name)

    @torch.no_grad()
    def _recall(self, message: Message) -> Tensor:
        candidates = [a for a in self._agreements if a.with_graph]
        if not candidates:
            raise RuntimeError(
                f"expected {self.name!r} to be recomputed after a forward with gradients, got a "
                "recomputation of one without: torch.utils.checkpoint with use_reentrant=True runs the "
                "backward of every replica by itself, but synchronized layers need one graph for all "
                "replicas; pass use_reentrant=False"
            )
        if len(candidates) == 1:
            return candidates[0].mean_invstd
        # The layer was called several times in this forward. A recomputation repeats the numbers of the first
        # pass, so the replica's own statistics tell which call it is. They are compared on their device, so
        # that the host does not wait for it.
        own = torch.stack([a.statistics for a in candidates])
        distance = (own - message.statistics).abs().flatten(1).amax(1)  # (calls,)
        nearest = distance.argmin().view(1)
        return torch.stack([a.mean_invstd for a in candidates]).index_select(0, nearest)[0]


def _in_backward() -> bool:
    """Whether this thread is inside of a backward. Torch has no public way to ask."""
    return bool(torch._C._current_graph_task_id() != -1)
