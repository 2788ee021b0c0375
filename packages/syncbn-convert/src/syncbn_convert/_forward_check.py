"""Find out from its code whether the forward of a class calls the synchronized forward."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from syncbn_core import SynchronizedBatchNorm

# The base class of all synchronized layers, which has their forward.
SYNCHRONIZED: type[nn.Module] = next(c for c in SynchronizedBatchNorm.__mro__ if "forward" in vars(c))


class _Reach(enum.Enum):
    SYNCHRONIZED = enum.auto()  # it calls the synchronized forward by the name of its class, or may do so
    NEXT = enum.auto()  # it calls super().forward
    NOTHING = enum.auto()


def why_unsynchronized(cls: type[nn.Module]) -> str:
    """Say why calls of ``cls``, which derives from a synchronized layer, do not synchronize.

    A class such as ``class Both(BatchNormAct, SynchronizedBatchNorm2d)`` synchronizes only if the forward of
    ``BatchNormAct`` calls ``super().forward``. If it calls ``torch.nn.functional.batch_norm``, nothing does.

    Args:
        cls: a subclass of a synchronized layer.

    Returns:
        The reason, to follow the name of the class. '' if its calls synchronize, or its code does not tell.
    """
    for owner in cls.__mro__:
        forward = vars(owner).get("forward")
        if forward is None:
            continue
        reach = _Reach.SYNCHRONIZED if owner is SYNCHRONIZED else _reach(forward, cls, set())
        if reach is _Reach.SYNCHRONIZED:
            break
        if reach is _Reach.NOTHING:
            return f"runs {owner.__qualname__}.forward, which does not call super().forward"
    return ""


def _reach(function: Any, cls: type[nn.Module], seen: set[FunctionType]) -> _Reach:
    """Find out what a forward, or a helper that it calls, goes on to."""
    while isinstance(function, (functools.partial, functools.partialmethod, staticmethod, classmethod)):
        function = function.func if hasattr(function, "func") else function.__func__
    if not isinstance(function, FunctionType):
        return _Reach.SYNCHRONIZED  # compiled or scripted code, which does not tell
    function = inspect.unwrap(function)
    if function in seen or function is vars(SYNCHRONIZED)["forward"]:
        return _Reach.NOTHING if function in seen else _Reach.SYNCHRONIZED
    seen.add(function)
    names = set(_names(function.__code__))
    cells = _closure(function)
    reached = {_reach(helper, cls, seen) for helper in _helpers(function, names, cells, cls)}
    if names & {"forward", "__call__"}:
        layers = cls.__mro__[1 : cls.__mro__.index(nn.Module)]
        mentioned = [c for c in layers if c.__name__ in names or any(c is cell for cell in cells)]
        reached |= {_reach(c.forward, cls, seen) for c in mentioned if hasattr(c, "forward")}
        if "super" in names:
            reached.add(_Reach.NEXT)
    return next((reach for reach in (_Reach.SYNCHRONIZED, _Reach.NEXT) if reach in reached), _Reach.NOTHING)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the global names and the attributes that this code uses, with the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _closure(function: FunctionType) -> list[Any]:
    """Return what the function takes from the functions around it, but for the class that super() needs."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    return [cell.cell_contents for name, cell in cells if name != "__class__"]


def _helpers(
    caller: FunctionType, names: set[str], cells: list[Any], cls: type[nn.Module]
) -> Iterator[FunctionType]:
    """Yield the functions and methods that ``caller`` may call, except those of torch."""
    methods = [inspect.getattr_static(cls, name, None) for name in names - {"forward"}]
    for found in (*methods, *map(caller.__globals__.get, names), *cells):
        function = getattr(found, "__func__", found)
        if isinstance(function, FunctionType):
            module = function.__module__ or ""
            if not module.startswith(("torch.", "syncbn_core.")):
                yield function
