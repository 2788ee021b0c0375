"""The modules that a replica reaches through its attributes and hooks, besides its registered sub-modules.

Copying the registered tree is not enough. A bound method in an attribute, a list or dict of modules, a
``functools.partial`` or a function whose closure holds a module would still run the original module in every
replica. This module finds such values and rebuilds them for each replica.

It searches in every forward, because a program may change the values between two forwards. It does not follow
global variables, nor the attributes of objects that are not modules.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from syncbn_parallel._module_tree import STANDARD_ATTRIBUTES, named_submodules

# Values of these types lead to no module. Most attributes are of these types, so this keeps the search short.
_LEAVES = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, range, slice}
    | {torch.dtype, torch.device, torch.Size, torch.memory_format, types.BuiltinFunctionType}
)

# Of the attributes of nn.Module itself, only the hooks can lead to further modules.
_HOOKS = tuple(sorted(key for key in STANDARD_ATTRIBUTES if "hooks" in key and "dict" not in key))
_FORWARD_HOOKS = tuple(key for key in _HOOKS if "forward" in key)

_STOCK_COPY = nn.Module._replicate_for_data_parallel


def copy_of(module: nn.Module) -> nn.Module:
    """Return ``module._replicate_for_data_parallel()``, with forward hooks of its own.

    This does the same as nn.Module's own method, except that it does not set the attributes that are replaced
    anyway. Setting them takes most of the time of a replication.
    """
    kind = type(module)
    if kind._replicate_for_data_parallel is _STOCK_COPY:
        made = kind.__new__(kind)
        object.__setattr__(made, "__dict__", {**module.__dict__, "_is_replica": True})
    else:
        made = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    state = made.__dict__
    for key in _FORWARD_HOOKS:
        hooks = state[key]
        state[key] = hooks.copy() if hooks else OrderedDict()
    return made


class References:
    """Tells which values lead to one of some modules or tensors.

    Args:
        targets: the ids of these modules and tensors.
    """

    def __init__(self, targets: Container[int]) -> None:
        self._targets = targets
        # By id, with the value: otherwise another object could get the same id.
        self._known: dict[int, tuple[Any, bool]] = {}

    def attributes_of(self, module: nn.Module) -> list[str]:
        """Return the attributes of ``module``, hooks included, that lead to a target."""
        state = module.__dict__
        found = [
            key
            for key in state.keys() - STANDARD_ATTRIBUTES
            if type(value := state[key]) not in _LEAVES and self.lead_from(value)
        ]
        found += [key for key in _HOOKS if state.get(key) and self.lead_from(state[key])]
        return found

    def lead_from(self, value: Any) -> bool:
        """Return whether ``value`` is a target, or leads to one."""
        kind = type(value)
        if kind in _LEAVES or (kind in (tuple, list) and _LEAVES.issuperset(map(type, value))):
            return False  # as almost all attributes of torch's layers
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = (value, self._search(value))
        return known[1]

    def _search(self, value: Any) -> bool:
        pending = [value]
        seen: dict[int, Any] = {}
        while pending:
            item = pending.pop()
            if id(item) in self._targets:
                return True
            if id(item) not in seen:
                seen[id(item)] = item
                pending += _parts_of(item)
        return False


def _parts_of(value: Any) -> Iterable[Any]:
    """Return what ``value`` holds, as far as it may lead to a module."""
    kind = _kind_of(type(value))
    parts: Iterable[Any]
    if kind is dict:
        parts = (*value.keys(), *value.values())
    elif kind is list:
        parts = tuple(value)  # another thread may change a set or a deque at the same time
    elif kind is types.FunctionType:
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        keywords = (value.__kwdefaults__ or {}).values()
        parts = (*cells, *(value.__defaults__ or ()), *keywords, *value.__dict__.values())
    elif kind is types.MethodType:
        parts = (value.__self__, value.__func__)
    elif kind is functools.partial:
        parts = (value.func, *value.args, *value.keywords.values())
    elif kind is weakref.ref:
        parts = (value(),)
    elif kind is nn.Module:
        parts = value._modules.values()
    else:
        return ()
    if _LEAVES.issuperset(map(type, parts)):
        return ()
    return [part for part in parts if type(part) not in _LEAVES]


_kinds: dict[type, type] = {
    list: list,
    tuple: list,
    set: list,
    frozenset: list,
    deque: list,
    dict: dict,
    OrderedDict: dict,
    types.FunctionType: types.FunctionType,
    types.MethodType: types.MethodType,
    functools.partial: functools.partial,
    weakref.ref: weakref.ref,
}


def _kind_of(kind: type) -> type | None:
    """Return how to search values of this type: as which of the types above, or as a module."""
    known = _kinds.get(kind)
    if known is not None:
        return known
    if issubclass(kind, nn.Module):
        return nn.Module
    if issubclass(kind, dict):
        return dict
    if issubclass(kind, (list, tuple, set, frozenset, deque)):
        return list
    if issubclass(kind, functools.partial):
        return functools.partial
    return None


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


class ReplicaReferences:
    """Rebuilds values that lead to modules, so that they lead to the modules of one replica.

    Shared values stay shared: a list under two names is one list in the replica as well. Values that lead to
    no module are not copied, so a counter in a closure counts for all replicas.

    Args:
        references: tells which values lead to the modules.
        stand_ins: the replacement of each of these modules and tensors, by the id of the original.
    """

    def __init__(self, references: References, stand_ins: Mapping[int, Any]) -> None:
        self._references = references
        self._stand_ins = stand_ins
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """Return the value for the replica; the same object if it leads to no module."""
        if type(value) in _LEAVES:
            return value
        stand_in = self._stand_ins.get(id(value))
        if stand_in is not None:
            return stand_in
        if not self._references.lead_from(value):
            return value
        made = self._made.get(id(value))
        return self._build(value) if made is None else made

    def _build(self, value: Any) -> Any:
        kind = _kind_of(type(value))
        if kind is dict:
            return self._dict(value)
        if kind is list:
            return self._sequence(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is nn.Module:
            return self._unregistered(value)
        made: Any
        if kind is types.MethodType:
            made = types.MethodType(self.of(value.__func__), self.of(value.__self__))
        elif kind is functools.partial:
            keywords = {key: self.of(item) for key, item in value.keywords.items()}
            made = type(value)(self.of(value.func), *map(self.of, value.args), **keywords)
        else:
            made = weakref.ref(self.of(value()))
        self._made[id(value)] = made
        return made

    # A value that can hold itself is noted before it is filled.

    def _dict(self, value: Any) -> Any:
        made = self._made[id(value)] = copy.copy(value)
        items = [(self.of(key), self.of(item)) for key, item in value.items()]
        made.clear()
        for key, item in items:
            made[key] = item
        return made

    def _sequence(self, value: Any) -> Any:
        if isinstance(value, (tuple, frozenset)):
            items = [self.of(item) for item in value]
            made = value._make(items) if hasattr(value, "_make") else type(value)(items)
            self._made[id(value)] = made
            return made
        made = self._made[id(value)] = copy.copy(value)
        items = [self.of(item) for item in value]
        made.clear()
        (made.update if isinstance(made, set) else made.extend)(items)
        return made

    def _function(self, value: Any) -> Any:
        uncompiled = getattr(value, "_torchdynamo_orig_callable", None)
        if uncompiled is not None:  # compiled code belongs to the module for which it was compiled
            made = self._made[id(value)] = self.of(uncompiled)
            return made
        unfilled: list[tuple[types.CellType, Any]] = []
        closure = tuple(self._cell(cell, unfilled) for cell in value.__closure__ or ())
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, closure or None)
        self._made[id(value)] = made
        for cell, contents in unfilled:
            cell.cell_contents = self.of(contents)
        made.__defaults__ = value.__defaults__ and tuple(map(self.of, value.__defaults__))
        if value.__kwdefaults__:
            made.__kwdefaults__ = {key: self.of(item) for key, item in value.__kwdefaults__.items()}
        made.__dict__.update({key: self.of(item) for key, item in value.__dict__.items()})
        made.__qualname__, made.__module__, made.__doc__ = value.__qualname__, value.__module__, value.__doc__
        return made

    def _cell(self, cell: types.CellType, unfilled: list[tuple[types.CellType, Any]]) -> types.CellType:
        """Return the cell itself if its contents stay, so that ``nonlocal`` variables stay shared."""
        if _is_empty(cell) or not self._references.lead_from(cell.cell_contents):
            return cell
        made: types.CellType | None = self._made.get(id(cell))
        if made is None:
            made = self._made[id(cell)] = types.CellType()
            unfilled.append((made, cell.cell_contents))
        return made

    def _unregistered(self, value: nn.Module) -> nn.Module:
        """Return a copy of a module that is not registered itself, but has registered ones inside."""
        made = self._made[id(value)] = copy_of(value)
        made.__dict__["_modules"] = {key: self.of(child) for key, child in value._modules.items()}
        return made


def turn_attributes(
    module: nn.Module, made: nn.Module, attributes: Sequence[str], to_replica: Callable[[Any], Any]
) -> None:
    """Make the attributes of a copy lead to the replica, if they are still those of its original.

    Args:
        module: the original.
        made: its copy.
        attributes: the attributes of the original that lead to a module or tensor of the model.
        to_replica: returns the value for the replica.
    """
    state = made.__dict__
    for key in attributes:
        value = state.get(key)
        # Values that `_replicate_for_data_parallel` has set stay as they are.
        if value is not None and (key in _FORWARD_HOOKS or value is module.__dict__[key]):
            state[key] = to_replica(value)


def turn_attributes_of_replicas(module: nn.Module, replicas: Sequence[nn.Module]) -> None:
    """Do the same for replicas from elsewhere, such as ``torch.nn.parallel.replicate``."""
    modules = [submodule for _, submodule in named_submodules(module)]
    references = References({id(submodule) for submodule in modules})
    attributes = list(map(references.attributes_of, modules))
    if not any(attributes):
        return
    for replica in replicas:
        copies = [copied for _, copied in named_submodules(replica)]
        if len(copies) != len(modules) or replica is module:
            continue
        stand_ins = {id(original): copied for original, copied in zip(modules, copies)}
        to_replica = ReplicaReferences(references, stand_ins)
        for original, copied, keys in zip(modules, copies, attributes):
            turn_attributes(original, copied, keys, to_replica.of)
