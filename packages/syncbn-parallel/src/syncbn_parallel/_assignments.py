"""What a forward assigns to its module: buffers and numbers, which a single model would keep.

A replica ends with its forward, and with it whatever the forward has assigned, as in ``self.steps += 1``. So
what replica 0 has assigned to a buffer goes to the module, as what it writes into a buffer does. A number,
such as a counter of steps, goes there if all replicas agree on it. Other attributes stay with the replicas:
most of them are for the rest of the same forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from syncbn_parallel._hints import warn_the_caller
from syncbn_parallel._module_tree import STANDARD_ATTRIBUTES, named_submodules

_NUMBERS = (int, float, bool)

_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def carry_assignments_over(originals: Sequence[tuple[str, nn.Module]], replicas: Sequence[nn.Module]) -> None:
    """Assign to the modules of a model what its replicas have assigned to themselves.

    Args:
        originals: the modules that were replicated, with their names.
        replicas: after their forward; replica 0 was given the buffers of the originals.
    """
    copies = [named_submodules(replicas[0])]
    if len(originals) != len(copies[0]):
        return  # an override of `replicate` has done something else
    for i, ((name, original), (_, first)) in enumerate(zip(originals, copies[0])):
        for key, buffer in first._buffers.items():
            if key in original._buffers and original._buffers[key] is not buffer:
                original._buffers[key] = buffer
        for key in _changed_numbers(original.__dict__, first.__dict__):
            if len(copies) == 1:  # seldom needed, so not walked before
                copies += map(named_submodules, replicas[1:])
            _carry_number(key, name, original, [column[i][1].__dict__.get(key) for column in copies])


def _changed_numbers(state: dict[str, Any], new_state: dict[str, Any]) -> list[str]:
    return [
        key
        for key in state.keys() - STANDARD_ATTRIBUTES
        if (type(state[key]) in _NUMBERS and new_state.get(key) is not state[key])
        and type(new_state.get(key)) in _NUMBERS
    ]


def _carry_number(key: str, name: str, original: nn.Module, values: Sequence[Any]) -> None:
    if all(value == values[0] for value in values):
        original.__dict__[key] = values[0]
    elif key not in _warned.setdefault(original, set()):
        _warned[original].add(key)
        path = f"{name}.{key}" if name else key
        warn_the_caller(
            f"expected all replicas to assign the same number to {path!r}, got {values}: the model keeps "
            f"{original.__dict__[key]!r}. Return the number from the forward as a tensor, or compute it "
            "outside of the model"
        )
