"""Splitting a batch over replicas and joining their outputs, on any devices and through nested containers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_Path = str


def scatter_kwargs(
    inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, devices: Sequence[torch.device], dim: int = 0
) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    """Split the arguments of one call into those of several.

    Every tensor in tuples, lists, dicts and named tuples, at any depth, is split along ``dim`` into at most
    ``len(devices)`` chunks of equal size, the last one perhaps smaller, as by ``torch.chunk``; the chunks move to their devices.
    Everything else goes to every replica as it is.

    Args:
        inputs: positional arguments.
        kwargs: keyword arguments.
        devices: where the chunks go, in order.
        dim: the batch dimension.

    Returns:
        The positional and the keyword arguments of each replica. There are as many as there are chunks, which may be fewer than devices;
        one for an empty batch, none where there is no argument at all, one per device where none of them has a tensor.

    Raises:
        ValueError: a tensor does not have dimension ``dim``, or two tensors make different numbers of chunks, so that a part of one
            would be lost.
    """
    arguments = (inputs, kwargs or {})
    if not any(arguments):
        return [], []
    counts = {
        path: _chunk_count(tensor, len(devices), dim, path)
        for name, argument in zip(("inputs", "kwargs"), arguments)
        for path, tensor in _tensors(argument, name)
    }
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"expected tensors that split alike along dim {dim} over {len(devices)} devices, got "
            + ", ".join(f"{count} chunks of {path}" for path, count in counts.items())
            + "; what every replica needs whole belongs in a buffer of the module"
        )
    count = next(iter(counts.values()), len(devices))
    chunks = _split(arguments, devices[:count], dim)
    return [own[0] for own in chunks], [own[1] for own in chunks]


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """Join the replicas' outputs, container by container, into one on ``device``.

    Tensors are concatenated along ``dim``, scalars (0-dimensional tensors) to a vector with one entry per replica. Everything else has to
    be the same in all replicas, and stays what it is.

    Args:
        outputs: what each replica returned, in rank order.
        device: where the result lives.
        dim: the batch dimension.

    Raises:
        ValueError: the outputs differ in structure or in something that is not a tensor. The message says where.
    """
    return _join(list(outputs), device, dim, "output")


def _is_named_tuple(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _rebuild_dict(like: dict[Any, Any], items: Iterator[tuple[Any, Any]]) -> dict[Any, Any]:
    if isinstance(like, defaultdict):
        return type(like)(like.default_factory, items)
    return type(like)(items)


def _tensors(value: Any, path: _Path) -> Iterator[tuple[_Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}[{key!r}]")


def _chunk_count(tensor: Tensor, most: int, dim: int, path: _Path) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"expected a tensor with a batch dimension {dim}, got shape {tuple(tensor.shape)} in {path}; "
            "pass a number, or keep it in a buffer of the module"
        )
    size = tensor.size(dim)
    return -(-size // -(-size // most)) if size else 1


def _split(value: Any, devices: Sequence[torch.device], dim: int) -> list[Any]:
    """Return the part of ``value`` for each device."""
    if isinstance(value, Tensor):
        chunks = value.chunk(len(devices), dim)
        return [chunk.to(device, non_blocking=True) for chunk, device in zip(chunks, devices, strict=True)]
    if isinstance(value, (tuple, list)) and value:
        rows = zip(*(_split(item, devices, dim) for item in value))
        if _is_named_tuple(value):
            return [type(value)(*row) for row in rows]
        return [list(row) if isinstance(value, list) else row for row in rows]
    if isinstance(value, dict) and value:
        rows = zip(*(_split(item, devices, dim) for item in value.values()))
        return [_rebuild_dict(value, zip(value, row)) for row in rows]
    return [value] * len(devices)


def _join(parts: list[Any], device: torch.device, dim: int, path: _Path) -> Any:
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(f"expected one type from all replicas, got {kinds} as {path}")
    if isinstance(first, Tensor):
        return _join_tensors(parts, device, dim, path)
    if isinstance(first, (tuple, list)):
        _check_alike(list(map(len, parts)), "length", path)
        items = [_join(list(row), device, dim, f"{path}[{i}]") for i, row in enumerate(zip(*parts))]
        return type(first)(*items) if _is_named_tuple(first) else type(first)(items)
    if isinstance(first, dict):
        _check_alike([sorted(map(repr, part)) for part in parts], "keys", path)
        return _rebuild_dict(
            first, ((key, _join([p[key] for p in parts], device, dim, f"{path}[{key!r}]")) for key in first)
        )
    _check_alike(parts, "value", path, hint="; return a tensor to have one entry per replica")
    return first


def _join_tensors(parts: list[Tensor], device: torch.device, dim: int, path: _Path) -> Tensor:
    scalars = [part.dim() == 0 for part in parts]
    _check_alike(scalars, "number of dimensions", path)
    here = [part.to(device, non_blocking=True) for part in parts]
    return torch.stack(here) if scalars[0] else torch.cat(here, dim)


def _check_alike(values: list[Any], what: str, path: _Path, hint: str = "") -> None:
    if not all(_same(value, values[0]) for value in values):
        raise ValueError(f"expected the same {what} from all replicas, got {values} as {path}{hint}")


def _same(left: Any, right: Any) -> bool:
    try:
        return left is right or bool(left == right)
    except Exception:  # an object that cannot be compared (an array, say) is not known to be the same
        return False
