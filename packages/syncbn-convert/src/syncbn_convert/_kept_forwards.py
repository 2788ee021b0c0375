"""The forwards of layers that a model keeps apart from them, such as ``self.norm = self.bn.forward``.

A bound method keeps the function that it was made of. After a change of the layer's class, it would still run
the forward of the old class.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

_PLAIN = (str, bytes, int, float, type(None))


def kept_forwards(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules whose bound ``forward`` is in an attribute of some module, with that attribute.

    This looks into lists, tuples, dicts and ``functools.partial``, at any depth.
    """
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "_modules" or isinstance(value, _PLAIN):
                continue
            for method in _methods(value, set()):
                layer = method.__self__
                if isinstance(layer, nn.Module) and method.__func__ is getattr(type(layer), "forward", None):
                    found.setdefault(layer, repr(f"{name}.{key}" if name else key))
    return found


def _methods(value: Any, seen: set[int]) -> Iterator[MethodType]:
    if isinstance(value, MethodType):
        yield value
    elif isinstance(value, (list, tuple, dict, functools.partial)) and id(value) not in seen:
        seen.add(id(value))
        parts: Any = value
        if isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, functools.partial):
            parts = (value.func, *value.args, *value.keywords.values())
        for part in parts:
            if not isinstance(part, _PLAIN):
                yield from _methods(part, seen)
