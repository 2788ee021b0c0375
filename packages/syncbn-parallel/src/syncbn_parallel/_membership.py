"""The replicas of one forward as a group: if one fails or finishes, those that wait for it get an error."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from syncbn_comm import ReplicaGroup, ReplicaLeftError, SyncMaster
from syncbn_parallel._module_tree import named_submodules

_CALL = "_replica_call"  # the attribute with the call that makes a replica a member


class ReplicaForward:
    """One forward of some replicas: if it fails for one of them, it ends for all of them at once.

    Args:
        group: its members are the replicas.
        masters: further places where the replicas may wait for each other, with their names.
    """

    def __init__(self, group: ReplicaGroup, masters: Iterable[tuple[str, SyncMaster]] = ()) -> None:
        self.group = group
        self._masters = list(masters)
        self._lock = threading.Lock()
        self._left = 0

    def abort(self, error: BaseException) -> None:
        """Make all who wait, or will wait, raise from ``error``."""
        self.group.abort(error)
        self.abort_masters(error)

    def abort_masters(self, error: BaseException) -> None:
        """Break the masters, which do not know that the group has broken."""
        with self._lock:
            for _, master in self._masters:
                master.abort(error)

    def leave(self, rank: int) -> None:
        """Tell the masters that this replica will not arrive any more."""
        last = self.group.world_size - 1
        with self._lock:
            self._left += 1
            for name, master in self._masters:
                if not master.broken:
                    master.abort(
                        ReplicaLeftError(
                            f"replica {rank} (of 0 to {last}) finished without reaching {name!r}"
                        )
                    )
        if self._left > last:
            self.end()

    def end(self) -> None:
        """Reset the masters once no replica runs any more."""
        with self._lock:
            masters, self._masters = self._masters, []
            for _, master in masters:
                if master.broken:
                    master.reset()


class _MemberCall:
    """A replica's call, inside which the replica is a member of its group."""

    def __init__(
        self,
        replica: nn.Module,
        call: Callable[..., Any],
        forward: ReplicaForward,
        rank: int,
        device: torch.device,
    ) -> None:
        # Weakly: in a cycle with itself, the replica would outlive its forward.
        self._replica = weakref.ref(replica)
        self._call = call
        self.forward = forward
        self._rank = rank
        self._device = device
        self._inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replica = self._replica()
        if self._inside:  # a module that calls itself
            return self._call(replica, *args, **kwargs)
        self._inside = True
        try:
            with self.forward.group.member(self._rank):
                try:
                    return self._call(replica, *args, **kwargs)
                except BaseException as error:
                    self._note(error)
                    raise
        except BaseException as error:
            self.forward.abort_masters(error)
            raise
        finally:
            self._inside = False
            self.forward.leave(self._rank)

    def _note(self, error: BaseException) -> None:
        replica = self._replica()
        where = "" if replica is None else _layer_of(error, replica)
        last = self.forward.group.world_size - 1
        error.add_note(f"raised in replica {self._rank} (of 0 to {last}) on {self._device}{where}")


def join_group(
    replicas: Sequence[nn.Module],
    devices: Sequence[torch.device],
    group: ReplicaGroup,
    masters: Iterable[tuple[str, SyncMaster]] = (),
) -> None:
    """Make each replica a member of ``group`` while it is called, whatever code calls it.

    Replicas that wait for another one get an error as soon as it has returned or raised. An exception gets a
    note that names the replica and the layer.
    """
    forward = ReplicaForward(group, masters)
    for rank, (replica, device) in enumerate(zip(replicas, devices)):
        kind = type(replica)
        if kind.__call__ is nn.Module.__call__:
            # nn.Module.__call__ looks this up on the instance. A `forward` in its place would run inside the
            # hooks.
            call = _MemberCall(replica, kind._call_impl, forward, rank, device)
            replica.__dict__["_call_impl"] = call
        else:  # a `__call__` is looked up on the class
            call = _MemberCall(replica, kind.__call__, forward, rank, device)
            replica.__class__ = _member_class(kind)
        replica.__dict__[_CALL] = call


def forward_of(replicas: Sequence[nn.Module]) -> ReplicaForward:
    """Return the forward that the replicas belong to; a new one if an override did not make them join one."""
    call = replicas[0].__dict__.get(_CALL)
    return call.forward if isinstance(call, _MemberCall) else ReplicaForward(ReplicaGroup(len(replicas)))


def first_failure(errors: Sequence[BaseException | None], group: ReplicaGroup) -> BaseException | None:
    """Return the exception that the user has to see: the cause, not the errors that followed from it."""
    raised = [error for error in errors if error is not None]
    return next((error for error in raised if error is group.failure), raised[0] if raised else None)


# Weak on both sides, since a subclass keeps its base class alive.
_member_classes: WeakKeyDictionary[type, weakref.ref[type]] = WeakKeyDictionary()


def _member_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of ``kind`` (which overrides ``__call__``) whose calls are those of a member."""
    known = _member_classes.get(kind)
    made = None if known is None else known()
    if made is None:

        def call_as_member(replica: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return replica.__dict__[_CALL](*args, **kwargs)

        names = {"__call__": call_as_member, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        metaclass: Any = type(kind)
        made = metaclass(kind.__name__, (kind,), names)
        _member_classes[kind] = weakref.ref(made)
    return cast(type[nn.Module], made)


def _layer_of(error: BaseException, replica: nn.Module) -> str:
    """Return ``", in layer 'layer1.0.bn1' (BatchNorm2d)"`` for the innermost layer that was running."""
    names = {id(module): name for name, module in named_submodules(replica)}
    found = ""
    # Not in the frame that handles the error: before Python 3.13, reading its locals keeps them alive, and
    # the error holds that frame.
    trace = error.__traceback__ and error.__traceback__.tb_next
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        name = names.get(id(module))
        if name:
            found = f", in layer {name!r} ({type(module).__name__})"
        trace = trace.tb_next
    return found
