"""What one replica of a layer knows of the others: how to meet them, and what they agreed on."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from syncbn_comm import ReplicaGroup


class Message(NamedTuple):
    """What a replica brings to a meeting.

    Attributes:
        statistics: mean and m2 of its own batch, and whatever rows follow.
        samples: how many are behind them.
        dtype: of its input.
    """

    statistics: Tensor
    samples: int
    dtype: torch.dtype


Master = Callable[[Sequence[tuple[int, Any]]], list[tuple[int, Any]]]
"""``[(rank, message), ...] -> [(rank, answer), ...]``, in replica 0's thread."""


class _Agreement(NamedTuple):
    own: Tensor  # the replica's own statistics
    agreed: Callable[[], Tensor | None]  # as long as it is needed
    in_grad_mode: bool


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
        self._agreements: list[_Agreement] = []

    @property
    def group(self) -> ReplicaGroup | None:
        """The replicas of this forward, where there are several."""
        group = self._forward.group if self._forward is not None else None
        return group if group is not None and group.world_size > 1 else None

    def agree(self, message: Message, master: Master, *, recomputable: bool) -> Tensor:
        """Meet the other replicas and return what they agree on.

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
        if in_backward():
            recalled = self._recall(message, recomputable)
            if recalled is not None:
                return recalled
        if self.nested:
            raise RuntimeError(
                f"expected one data-parallel wrapper around {self.name!r}, got one inside of another: the "
                "layer could synchronize the replicas of the inner one alone; give all devices to the outer"
            )
        agreed = self.meet(message, master)
        if agreed is None:  # others have come with something else, and come again
            agreed = self.meet(message, master)
        self._remember(message.statistics.detach(), agreed)
        return cast(Tensor, agreed)

    def meet(self, message: Any, master: Master) -> Any:
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
        known = [(a, agreed) for a in self._agreements if (agreed := a.agreed()) is not None]
        if not known:
            return None
        # If the layer was called several times in this forward: a recomputation repeats the numbers of the
        # first pass, so the replica's own statistics tell which call it is. They are compared on their
        # device, so that the host does not wait for it.
        distance = (torch.stack([a.own for a, _ in known]) - message.statistics).abs()  # (calls, rows, C)
        nearest = distance.flatten(1).amax(1).argmin().view(1)
        if not all(a.in_grad_mode for a, _ in known) and not known[int(nearest)][0].in_grad_mode:
            raise RuntimeError(
                f"expected {self.name!r} to be recomputed after a forward with gradients, got a "
                "recomputation of one without: torch.utils.checkpoint with use_reentrant=True runs the "
                "backward of every replica by itself, but synchronized layers need one graph for all "
                "replicas; pass use_reentrant=False"
            )
        agreed = torch.stack([agreed for _, agreed in known]).index_select(0, nearest)[0]
        # As in the forward, so that the same tensors are saved.
        return agreed.requires_grad_(any(agreed.requires_grad for _, agreed in known))

    def _remember(self, own: Tensor, agreed: Tensor) -> None:
        self._agreements = [a for a in self._agreements if a.agreed() is not None]
        if agreed.requires_grad:
            recall: Callable[[], Tensor | None] = weakref.ref(agreed)  # a graph keeps it
        elif self.group is not None:
            recall = partial(_same, agreed)  # for as long as the replica lives
        else:
            return
        self._agreements.append(_Agreement(own, recall, torch.is_grad_enabled()))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def in_backward() -> bool:
    """Whether this thread is inside of a backward. Torch has no public way to ask."""
    return bool(torch._C._current_graph_task_id() != -1)


def may_be_intercepted() -> bool:
    """Whether hooks may intercept what this thread saves for backward.

    Torch has no public way to ask, and before version 2.8 no way at all.
    """
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    except (AttributeError, TypeError):
        return True
