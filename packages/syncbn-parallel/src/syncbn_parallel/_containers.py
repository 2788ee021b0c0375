"""Containers in the arguments and outputs of a model: what they hold, and how to rebuild them."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import defaultdict, deque
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a NumPy array that has a dimension."""
    numpy = sys.modules.get("numpy")  # if it has not been imported, there are no arrays
    return numpy is not None and isinstance(value, numpy.ndarray) and value.ndim > 0


def has_rows(value: Any) -> bool:
    """Return whether ``value`` can be split: a tensor, or a NumPy array that has a dimension."""
    return isinstance(value, Tensor) or is_array(value)


def parts_of(value: Any, path: str) -> list[tuple[str, Any]] | None:
    """Return what a container holds, each with its path; None if ``value`` is not a container.

    Raises:
        TypeError: it is a ``PackedSequence``.
    """
    if isinstance(value, PackedSequence):
        raise TypeError(
            f"expected padded tensors, got a PackedSequence in {path}: it is sorted by time step, so it "
            "cannot be split or joined by samples; call pack_padded_sequence and pad_packed_sequence inside "
            "the forward of the module"
        )
    if isinstance(value, (tuple, list, deque)):
        return [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return [(f"{path}[{key!r}]", value[key]) for key in value]
    if is_dataclass_instance(value):
        return [(f"{path}.{name}", getattr(value, name)) for name in _attributes(value)]
    return None


def keys_of(container: Any) -> Any:
    """Return what has to be equal in two containers of one type to join them part by part."""
    if isinstance(container, Mapping):
        return set(container)
    return set(_attributes(container)) if is_dataclass_instance(container) else len(container)


def rebuilt(like: Any, parts: Sequence[Any], path: str) -> Any:
    """Return a container like ``like``, of the same type, with other parts in the same order.

    Raises:
        TypeError: the type cannot be rebuilt.
    """
    try:
        if isinstance(like, (tuple, list)):
            return like._make(parts) if hasattr(like, "_make") else type(like)(parts)
        if isinstance(like, deque):
            return type(like)(parts, like.maxlen)
        if isinstance(like, Mapping):
            return _mapping(like, dict(zip(like, parts)))
        return _dataclass(like, parts)
    except Exception as error:
        raise TypeError(
            f"expected containers that can be rebuilt, got a {type(like).__name__} in {path}, which raised"
            f" {type(error).__name__}: {error}; use a dict, a list, a tuple or a dataclass in its place"
        ) from error


def is_dataclass_instance(value: Any) -> bool:
    """Return whether ``value`` is an instance of a dataclass and not a module."""
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module))


def _attributes(value: Any) -> list[str]:
    """Return the fields of a dataclass that are set, and its other attributes."""
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return list(dict.fromkeys([*names, *getattr(value, "__dict__", {})]))


def _mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(like) is dict:
        return items
    if isinstance(like, defaultdict):
        return type(like)(like.default_factory, items)
    if not isinstance(like, MutableMapping):
        return type(like)(items)  # type: ignore[call-arg]
    made = copy.copy(like)
    for key, item in items.items():
        made[key] = item
    if made is like or any(made[key] is not item for key, item in items.items()):
        raise TypeError("its copy does not hold the same items")
    return made


def _dataclass(like: Any, parts: Sequence[Any]) -> Any:
    # Not by its constructor, which may need other arguments, or compute the fields again.
    made = copy.copy(like)
    for name, part in zip(_attributes(like), parts):
        object.__setattr__(made, name, part)
    return made
