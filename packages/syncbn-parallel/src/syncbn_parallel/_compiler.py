"""Keeping torch's compiler out of a forward that hands work to other threads."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

REASON = "replicas run in other threads, whose work the compiler cannot trace; compile the module inside"
_HAS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.7 on
_OPTIONS: dict[str, Any] = {"reason": REASON} if _HAS_REASON else {}


def outside_of_the_compiler(function: _F) -> _F:
    """Keep the compiler out, as ``torch.compiler.disable(function, reason=...)`` does, without loading it.

    That decorator imports the compiler, which takes a second. Here it is imported only where it is used.
    """

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        # Nothing is compiled in a process that has not loaded the compiler. If the compiler itself traces
        # this function, the first condition is decided at once, and the second is not evaluated.
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            return uncompiled(*args, **kwargs)
        return function(*args, **kwargs)

    disabled: list[Callable[..., Any]] = []

    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(cast(Any, torch.compiler.disable)(function, **_OPTIONS))
        return disabled[0](*args, **kwargs)

    # The compiler may meet this function before it has ever been called. These are the private marks that
    # `torch.compiler.disable` leaves: do not trace a call of it, for this reason.
    uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
    uncompiled._torchdynamo_disable_msg = REASON  # type: ignore[attr-defined]
    return cast(_F, inner)
