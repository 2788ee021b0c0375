"""Joining the outputs of replicas, on any devices and through nested containers."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn_parallel._containers import is_array, keys_of, parts_of, rebuilt
from syncbn_parallel._devices import moved

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """Join the outputs of the replicas, container by container, into one on ``device``.

    Tensors and NumPy arrays are concatenated along ``dim``; scalars (0-dimensional tensors) become a vector
    with one entry per replica. This reaches into tuples, lists, deques, named tuples, mappings and
    dataclasses. Everything else has to be the same in all replicas, and is returned as it is.

    Args:
        outputs: what each replica returned, in rank order.
        device: the device of the tensors in the result.
        dim: the batch dimension.

    Raises:
        ValueError: the outputs differ in structure, or in something that is not a tensor. The message says
            where, and what to return instead.
        TypeError: an output is a ``PackedSequence``, or a container that cannot be rebuilt.
    """
    return _join(outputs, device, dim, "the output")


def _join(outputs: Sequence[Any], device: torch.device, dim: int, path: str) -> Any:
    first = outputs[0]
    _check_alike([Tensor if isinstance(one, Tensor) else type(one) for one in outputs], "type", path)
    if isinstance(first, Tensor):
        _check_alike([one.dim() == 0 for one in outputs], "kind of tensor, scalar or not,", path)
        here = [moved(one, device) for one in outputs]
        return torch.cat(here, dim) if first.dim() else torch.stack(here)
    if is_array(first):
        import numpy

        return numpy.concatenate(outputs, dim)
    parts = parts_of(first, path)
    if parts is not None:
        keys = list(map(keys_of, outputs))
        _check_alike(keys, "length" if isinstance(keys[0], int) else "keys", path)
        tables = [dict(parts_of(one, path) or ()) for one in outputs]
        columns = [(key, [table[key] for table in tables]) for key, _ in parts]
        return rebuilt(first, [_join(column, device, dim, key) for key, column in columns], path)
    if all(_same(one, first) for one in outputs):
        return first
    if isinstance(first, _PLAIN):
        raise ValueError(
            f"expected the same value from every replica, got {reprlib.repr(list(outputs))} in {path}; "
            "return a tensor to have one entry for each"
        )
    raise ValueError(
        f"expected outputs that can be joined, got {path} of type {type(first).__name__}, which differs "
        "between replicas; return tensors, or a tuple, list, dict or dataclass of tensors"
    )


def _check_alike(values: Sequence[Any], what: str, path: str) -> None:
    if not all(_same(value, values[0]) for value in values):
        raise ValueError(
            f"expected the same {what} from every replica, got {reprlib.repr(list(values))} in {path}"
        )


def _same(left: Any, right: Any) -> bool:
    try:
        return left is right or bool(left == right)
    except Exception:  # an object that cannot be compared counts as different
        return False
