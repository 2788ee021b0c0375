"""What a layer does when it is replicated, copied or pickled."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_core._processes.collectives import Calls, Scope
from syncbn_core._replicas.place import Place, ReplicationContext
from syncbn_core._replicas.stock_data_parallel import enlist, enlist_by_context, is_counted

# Attributes that belong to one process or one forward, and so are not copied or pickled.
_TRANSIENT = frozenset({"_place", "_original", "_layer_id"})

# Not on the layers: nothing of a forward stays on a model.
_calls: weakref.WeakKeyDictionary[nn.Module, Calls] = weakref.WeakKeyDictionary()


class ReplicatedLayer(nn.Module):
    """A layer whose replicas know each other."""

    process_group: Any = None

    layer_name: str | None = None
    _place: Place | None = None
    _original: weakref.ref[Any] | None = None  # on a replica: the layer of the replicated model
    _layer_id: int | None = None  # the id of that layer, which may be gone

    def _group(self) -> ReplicaGroup | None:
        """Return the replicas of this forward in this process, where there are several."""
        return self._place.group if self._place is not None else None

    def _own_place(self) -> Place:
        """Return this replica's place among the others, or that of a layer alone."""
        if self._place is None:
            self._place = Place(None, 0, self._where())
        return self._place

    def _own_calls(self) -> Calls:
        """Return the counter of calls that the replicas share."""
        return _calls.setdefault(self._of_model(), Calls())

    def _of_model(self) -> ReplicatedLayer:
        """Return the layer of the replicated model that this is a replica of; itself if it is none."""
        original: ReplicatedLayer | None = self._original() if self._original is not None else None
        return self if original is None else original

    def _where(self) -> str:
        """Return the layer's name for messages: in the model where it is known, else its class."""
        return self._place.name if self._place is not None else self._name_in_all_processes()

    def _name_in_all_processes(self) -> str:
        """Return a name that does not depend on how many replicas this process runs."""
        return self.layer_name or type(self).__name__

    def __data_parallel_replicate__(self, ctx: ReplicationContext, copy_id: int) -> None:
        """Take the place of replica ``copy_id`` in this forward; called on every replica, the master first.

        A context of another library has no group. Then the replicas of the layer that get the same context
        belong together, unless torch's own loop made them: then the layers have counted them.
        """
        nested = self._place is not None and self._place.nested  # known since the replica was made
        name = getattr(ctx, "name", None) or self._where()
        if getattr(ctx, "group", None) is not None:
            self._place = Place(ctx, copy_id, name, nested)
        elif not is_counted(self._place):
            self._place = enlist_by_context(self._layer_id or id(self), ctx, copy_id, name, nested)

    def _replicate_for_data_parallel(self) -> Self:
        nested = self._group() is not None
        replica = self.__new__(type(self))
        # As nn.Module's own method, which sets attributes one by one and takes three times as long.
        replica.__dict__.update(
            self.__dict__,
            _parameters={},
            _buffers=self._buffers.copy(),
            _modules=self._modules.copy(),
            _is_replica=True,
            _place=enlist(self, self._where(), nested),
            _original=weakref.ref(self),
            _layer_id=id(self),
        )
        return replica

    @contextmanager
    def _carrying_back(self) -> Iterator[None]:
        """Copy what is assigned to this replica inside the block to the layer of the replicated model."""
        original = self._of_model()
        if original is self:
            yield
            return
        buffers, attributes = dict(self._buffers), dict(self.__dict__)
        yield
        with torch.no_grad():
            for name, new in self._buffers.items():
                old = buffers.get(name)
                if new is old:
                    continue
                if old is None or new is None or old.shape != new.shape:
                    original._buffers[name] = new
                else:  # in place: the tensors of replica 0 are the storage of the model
                    self._buffers[name] = old.copy_(new)
        for name, value in self.__dict__.items():
            if name not in attributes or attributes[name] is not value:
                original.__dict__[name] = value

    def __getstate__(self) -> dict[str, Any]:
        state = self._lasting_state()
        if self.process_group is not None and not isinstance(self.process_group, Scope):
            del state["process_group"]  # belongs to this process and cannot be pickled
            # The text is the same for every layer, so that a model gets one warning.
            warnings.warn(
                "the process_group of synchronized layers is not part of a pickle, so the loaded layers will "
                "synchronize over the default group. Set their process_group after loading, or save "
                "model.state_dict() instead of the model",
                stacklevel=2,
            )
        return state

    def __copy__(self) -> Self:
        clone = self.__new__(type(self))
        clone.__dict__.update(self._lasting_state())
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.process_group)] = self.process_group
        clone = memo[id(self)] = self.__new__(type(self))
        clone.__setstate__(copy.deepcopy(self._lasting_state(), memo))  # type: ignore[no-untyped-call]
        return clone

    def _lasting_state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _TRANSIENT}
