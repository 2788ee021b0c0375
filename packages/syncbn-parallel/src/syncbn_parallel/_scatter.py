"""Splitting the arguments of one call over replicas, on any devices and through nested containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from syncbn_parallel._containers import has_rows, parts_of, rebuilt
from syncbn_parallel._devices import moved
from syncbn_parallel._hints import warn_the_caller

# The types of objects for which a warning has said that every replica gets the whole object.
_warned: WeakSet[type] = WeakSet()

# How far to search an object for tensors: the levels, and the entries of each container.
_LEVELS = 3
_ENTRIES = 100


@dataclass(frozen=True)
class _Chunks:
    """How the rows of one tensor are split; all chunks except the last one have the same size."""

    rows: int
    count: int
    size: int
    last: int

    def __str__(self) -> str:
        return f"{self.rows} rows in {self.count} chunks of {self.size}" + (
            f" (the last of {self.last})" if self.last != self.size else ""
        )


def scatter_kwargs(
    inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, devices: Sequence[torch.device], dim: int = 0
) -> tuple[tuple[tuple[Any, ...], ...], tuple[dict[str, Any], ...]]:
    """Split the arguments of one call into those of several.

    Every tensor and every NumPy array is split along ``dim`` into at most ``len(devices)`` chunks, all of one
    size except for a smaller last one, and the tensors move to their devices. This reaches into tuples,
    lists, deques, named tuples, mappings and dataclasses, at any depth. Everything else goes to every replica
    as it is; for an object that holds tensors, a warning says so, once per type.

    A chunk on the device of its tensor shares its memory. For autograd it is not a view, so a replica may
    change it in place.

    Args:
        inputs: positional arguments.
        kwargs: keyword arguments.
        devices: the devices of the chunks, in order.
        dim: the batch dimension.

    Returns:
        The positional and the keyword arguments of each call. There are as many calls as chunks: fewer than
        devices for a small batch, one for an empty batch, and as many as devices if no argument has a tensor.
        Without arguments there are no calls.

    Raises:
        ValueError: a tensor has no dimension ``dim``; or two tensors cannot be split side by side, because
            they make different numbers of chunks, or the chunks of one are not all the same whole multiple of
            those of the other. An empty tensor goes with any others.
        TypeError: an argument is a ``PackedSequence``, a sparse or nested tensor, or a container that cannot
            be built anew.
    """
    arguments = (tuple(inputs), dict(kwargs or {}))
    if not any(arguments):
        return (), ()
    found = {
        path: _chunks(tensor, len(devices), dim, path)
        for value, name in zip(arguments, ("inputs", "kwargs"))
        for path, tensor in _leaves(value, name)
    }
    count = _common_count(found, dim)
    if count is None:
        count = 1 if found else len(devices)
    rows, kwrows = (
        _split(value, devices[:count], dim, name) for value, name in zip(arguments, ("inputs", "kwargs"))
    )
    return tuple(rows), tuple(kwrows)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every tensor and array with its path."""
    if has_rows(value):
        yield path, value
        return
    parts = parts_of(value, path)
    if parts is None:
        _warn_of_hidden_rows(value, path)
        return
    for part_path, part in parts:
        yield from _leaves(part, part_path)


def _chunks(tensor: Any, most: int, dim: int, path: str) -> _Chunks:
    """Return how ``Tensor.chunk`` splits; an empty tensor makes 0 chunks, which means any number."""
    if isinstance(tensor, Tensor) and most > 1 and (tensor.layout is not torch.strided or tensor.is_nested):
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(
            f"expected a dense tensor to split, got a {kind} one in {path}: pass it as a dense tensor, or, "
            "if every replica needs it whole, make it a buffer of the module"
        )
    if not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(
            f"expected a tensor with a batch dimension {dim}, got one of shape {tuple(tensor.shape)} "
            f"in {path}; pass a number, or make it a buffer of the module"
        )
    rows = tensor.shape[dim]
    if rows == 0:
        return _Chunks(0, 0, 0, 0)
    size = -(-rows // most)
    count = -(-rows // size)
    return _Chunks(rows, count, size, rows - (count - 1) * size)


def _common_count(found: Mapping[str, _Chunks], dim: int) -> int | None:
    """Return how many chunks the tensors make; None if they are all empty, or there are none."""
    filled = [chunks for chunks in found.values() if chunks.count]
    if not filled:
        return None
    first = filled[0]
    if all(_side_by_side(chunks, first) for chunks in filled):
        return first.count
    raise ValueError(
        f"expected tensors of one size along dim {dim}, or tensors that can be split side by side, got "
        + ", ".join(f"{chunks} of {path}" for path, chunks in found.items() if chunks.count)
        + "; if every replica needs the whole tensor, make it a buffer of the module"
    )


def _side_by_side(one: _Chunks, other: _Chunks) -> bool:
    """Return whether a row of one tensor goes with the same number of rows of the other in all chunks."""
    small, large = sorted((one, other), key=lambda chunks: chunks.size)
    times = large.size // small.size
    return (large.count, large.size, large.last) == (small.count, times * small.size, times * small.last)


def _split(value: Any, devices: Sequence[torch.device], dim: int, path: str) -> list[Any]:
    """Return the part of ``value`` for each device."""
    if isinstance(value, Tensor):
        return _split_tensor(value, devices, dim)
    if has_rows(value):
        size = -(-value.shape[dim] // len(devices))
        before = (slice(None),) * (dim % value.ndim)
        return [value[(*before, slice(i * size, (i + 1) * size))] for i in range(len(devices))]
    parts = parts_of(value, path)
    # Each replica gets its own list or dict, which its forward may change.
    if parts and (type(value) in (tuple, list, dict) or any(True for _ in _leaves(value, path))):
        rows = zip(*(_split(part, devices, dim, part_path) for part_path, part in parts))
        return [rebuilt(value, row, path) for row in rows]
    return [value] * len(devices)


def _split_tensor(tensor: Tensor, devices: Sequence[torch.device], dim: int) -> list[Tensor]:
    if len(devices) == 1:
        return [moved(tensor, devices[0])]
    if tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
        # A leaf must not be changed in place. Its chunks are views, so torch refuses that here too.
        chunks = tensor.chunk(len(devices), dim)
    else:
        # Unlike the chunks of `chunk`, these are not views. Each may be changed in place and has a version of
        # its own, which the backward checks. `InputChanges` does the rest of what a view does.
        chunks = tensor.unsafe_chunk(len(devices), dim)
    return [moved(chunk, device) for chunk, device in zip(chunks, devices, strict=True)]


def _warn_of_hidden_rows(value: Any, path: str) -> None:
    kind = type(value)
    if kind in _warned or isinstance(value, (nn.Module, type)) or not _hides_rows(value, _LEVELS):
        return
    _warned.add(kind)
    warn_the_caller(
        f"expected arguments that can be split over replicas, got {path} of type {kind.__module__}."
        f"{kind.__qualname__}, which holds tensors: every replica gets the whole object, with all rows. Pass "
        "the tensors themselves, or a tuple, list, dict or dataclass of them"
    )


def _hides_rows(value: Any, levels: int) -> bool:
    """Return whether an object that cannot be split holds a tensor with a dimension."""
    if has_rows(value):
        return bool(value.ndim)
    if levels == 0 or isinstance(value, (nn.Module, type, str, bytes)):
        return False
    inside: Any = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (Sequence, Set)):
        inside = value
    elif hasattr(value, "__dict__"):
        inside = vars(value).values()
    elif hasattr(type(value), "__slots__"):
        inside = [getattr(value, name, None) for name in type(value).__slots__]
    try:
        return any(_hides_rows(item, levels - 1) for item in islice(inside, _ENTRIES))
    except Exception:  # an object that cannot be searched counts as one without tensors
        return False
