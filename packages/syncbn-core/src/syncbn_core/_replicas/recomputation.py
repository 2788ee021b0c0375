"""What replicas agreed on in a forward, for gradient checkpoints that recompute a part of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class _Agreement(NamedTuple):
    own: Tensor  # the replica's own statistics
    agreed: Callable[[], Tensor | None]  # None when no graph needs it any more
    in_grad_mode: bool
    backward: int  # the backward in which it was made; -1 for none


class Agreements:
    """What one replica of a layer has agreed on with the others in one forward."""

    def __init__(self) -> None:
        self._known: list[_Agreement] = []

    @torch.no_grad()
    def recall(self, own: Tensor, name: str, recomputable: bool) -> Tensor | None:
        """Return what was agreed on in the forward that is being recomputed; None if nothing was.

        Args:
            own: the replica's own statistics, in the recomputation.
            name: the layer's name, for error messages.
            recomputable: whether a recomputation saves the same tensors as the forward did.

        Raises:
            RuntimeError: the recomputation cannot be right.
        """
        if not recomputable:
            raise RuntimeError(
                f"expected {name!r} to run once, got a recomputation (gradient checkpointing) of a "
                "layer built with fused=False, whose graph spans all replicas: build it with fused=True, "
                "or leave it out of the checkpoint"
            )
        known = [
            (a, agreed)
            for a in self._known
            # What was agreed on in this backward belongs to another call of the layer, since a checkpoint
            # with use_reentrant=True runs the whole forward there.
            if a.backward != current_backward() and (agreed := a.agreed()) is not None
        ]
        if not known:
            return None
        # The layer may have been called several times in this forward. A recomputation repeats the numbers of
        # the first pass, so the replica's own statistics identify the call. They are compared on their
        # device, so that the host does not wait for it.
        distance = (torch.stack([a.own for a, _ in known]) - own).abs()  # (calls, rows, C)
        nearest = distance.flatten(1).amax(1).argmin().view(1)
        if not all(a.in_grad_mode for a, _ in known) and not known[int(nearest)][0].in_grad_mode:
            raise RuntimeError(
                f"expected {name!r} to be recomputed after a forward with gradients, got a "
                "recomputation of one without: torch.utils.checkpoint with use_reentrant=True runs the "
                "backward of every replica by itself, but synchronized layers need one graph for all "
                "replicas; pass use_reentrant=False"
            )
        agreed = torch.stack([agreed for _, agreed in known]).index_select(0, nearest)[0]
        # As in the forward, so that the same tensors are saved.
        return agreed.requires_grad_(any(agreed.requires_grad for _, agreed in known))

    def remember(self, own: Tensor, agreed: Tensor, *, keeps: bool) -> None:
        """Remember what was agreed on.

        Args:
            own: the replica's own statistics.
            agreed: the mean and invstd to normalize with.
            keeps: whether to keep it as long as the replica exists, if no graph keeps it.
        """
        self._known = [a for a in self._known if a.agreed() is not None]
        if agreed.requires_grad and torch.is_grad_enabled():
            recall: Callable[[], Tensor | None] = weakref.ref(agreed)  # a graph keeps it
        elif keeps:
            recall = partial(_same, agreed.detach())
        else:
            return
        self._known.append(_Agreement(own, recall, torch.is_grad_enabled(), current_backward()))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def current_backward() -> int:
    """Return the number of the backward that this thread is in; -1 outside of one."""
    # Private to torch, which has no public way to ask.
    return int(torch._C._current_graph_task_id())


def in_backward() -> bool:
    """Whether this thread is inside of a backward."""
    return current_backward() != -1


def may_be_intercepted() -> bool:
    """Whether hooks may intercept what this thread saves for backward, as gradient checkpoints do."""
    try:
        # Private to torch, which has no public way to ask, and before version 2.8 no way at all.
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    except (AttributeError, TypeError):
        return True
