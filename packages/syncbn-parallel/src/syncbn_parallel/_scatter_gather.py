"""Splitting a batch over replicas and joining their outputs, on any devices and through nested containers."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn_parallel._devices import moved


def scatter_kwargs(
    inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, devices: Sequence[torch.device], dim: int = 0
) -> tuple[tuple[tuple[Any, ...], ...], tuple[dict[str, Any], ...]]:
    """Split the arguments of one call into those of several.

    Every tensor in tuples, lists, dicts and named tuples, at any depth, is split along ``dim`` into at most
    ``len(devices)`` chunks, all of one size but for a smaller last one; the chunks move to their devices.
    Everything else goes to every replica as it is. Tensors may differ in size, as long as they make equally
    many chunks; an empty one goes with any others.

    Args:
        inputs: positional arguments.
        kwargs: keyword arguments.
        devices: where the chunks go, in order.
        dim: the batch dimension.

    Returns:
        The positional and the keyword arguments of each call. There are as many calls as chunks: fewer than
        devices for a small batch, one for an empty one, as many as devices where no argument has a tensor.
        There is none where there is no argument.

    Raises:
        ValueError: a tensor has no dimension ``dim``, or two tensors make different numbers of chunks.
    """
    arguments = (tuple(inputs), dict(kwargs or {}))
    if not any(arguments):
        return (), ()
    counts = {
        path: _chunk_count(tensor, len(devices), dim, path)
        for value, name in zip(arguments, ("inputs", "kwargs"))
        for path, tensor in _tensors(value, name)
    }
    distinct = {count for count in counts.values() if count > 0} or ({1} if counts else {len(devices)})
    if len(distinct) > 1:
        raise ValueError(
            f"expected tensors that make equally many chunks along dim {dim}, got "
            + ", ".join(f"{count} of {path}" for path, count in counts.items())
            + "; a tensor that every replica needs whole belongs into a buffer of the module"
        )
    calls = _split(arguments, devices[: distinct.pop()], dim)
    return tuple(own for own, _ in calls), tuple(own for _, own in calls)


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """Join the outputs of the replicas, container by container, into one on ``device``.

    Tensors are concatenated along ``dim``, scalars (0-dimensional tensors) become a vector with one entry per
    replica. Everything else has to be the same in all replicas, and stays what it is.

    Args:
        outputs: what each replica returned, in rank order.
        device: where the result lives.
        dim: the batch dimension.

    Raises:
        ValueError: the outputs differ in structure, or in something that is no tensor. The message says
        where.
    """
    return _join(outputs, device, dim, "the output")


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")


def _chunk_count(tensor: Tensor, most: int, dim: int, path: str) -> int:
    """Return how many chunks ``Tensor.chunk`` makes; 0 stands for any number, of an empty tensor."""
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"expected a tensor with a batch dimension {dim}, got one of shape {tuple(tensor.shape)} "
            f"in {path}; pass a number, or make it a buffer of the module"
        )
    size = tensor.size(dim)
    chunk_size = -(-size // most)
    return -(-size // chunk_size) if size else 0


def _split(value: Any, devices: Sequence[torch.device], dim: int) -> list[Any]:
    """Return the part of ``value`` for each device."""
    if isinstance(value, Tensor):
        chunks = value.chunk(len(devices), dim)
        return [moved(chunk, device) for chunk, device in zip(chunks, devices, strict=True)]
    if isinstance(value, (tuple, list)) and value:
        rows = zip(*(_split(item, devices, dim) for item in value))
        return [_rebuild_sequence(value, row) for row in rows]
    if isinstance(value, dict) and value:
        rows = zip(*(_split(item, devices, dim) for item in value.values()))
        return [_rebuild_dict(value, zip(value, row)) for row in rows]
    return [value] * len(devices)


def _join(parts: Sequence[Any], device: torch.device, dim: int, path: str) -> Any:
    first = parts[0]
    _check_alike([Tensor if isinstance(part, Tensor) else type(part) for part in parts], "type", path)
    if isinstance(first, Tensor):
        _check_alike([part.dim() == 0 for part in parts], "kind of tensor, scalar or not,", path)
        here = [moved(part, device) for part in parts]
        return torch.cat(here, dim) if first.dim() else torch.stack(here)
    if isinstance(first, (tuple, list)):
        _check_alike([len(part) for part in parts], "length", path)
        rows = enumerate(zip(*parts))
        return _rebuild_sequence(first, [_join(row, device, dim, f"{path}[{i}]") for i, row in rows])
    if isinstance(first, dict):
        _check_alike([part.keys() for part in parts], "keys", path)
        columns = ((key, [part[key] for part in parts]) for key in first)
        return _rebuild_dict(first, ((k, _join(c, device, dim, f"{path}[{k!r}]")) for k, c in columns))
    _check_alike(parts, "value", path, "; return a tensor to have one entry for each")
    return first


def _rebuild_sequence(like: Any, items: Iterable[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def _rebuild_dict(like: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    return type(like)(like.default_factory, items) if isinstance(like, defaultdict) else type(like)(items)


def _check_alike(values: Sequence[Any], what: str, path: str, hint: str = "") -> None:
    if not all(_same(value, values[0]) for value in values):
        raise ValueError(
            f"expected the same {what} from every replica, got {reprlib.repr(list(values))} in {path}{hint}"
        )


def _same(left: Any, right: Any) -> bool:
    try:
        return left is right or bool(left == right)
    except Exception:  # of an object that cannot be compared as a whole (an array) it is not known
        return False
