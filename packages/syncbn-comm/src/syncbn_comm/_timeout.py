"""How long to wait: the argument, or the environment variable, or five minutes."""

from __future__ import annotations

import os
import threading
from types import EllipsisType
from typing import TypeAlias

from syncbn_comm._errors import MisuseError

# ``...`` is the default, because None means "forever".
Timeout: TypeAlias = float | EllipsisType | None

ENVIRONMENT_VARIABLE = "SYNCBN_TIMEOUT"
DEFAULT_SECONDS = 300.0


def resolve_timeout(timeout: Timeout = ...) -> float | None:
    """Turn a ``timeout`` argument into seconds, or None for an unlimited wait.

    Args:
        timeout: seconds; None waits forever; ``...`` reads the environment variable ``SYNCBN_TIMEOUT``
            (seconds, or ``none``), and is 300 seconds if it is not set.

    Returns:
        Seconds, or None.

    Raises:
        MisuseError: it is not a positive number of seconds, or more than a lock can wait for.

    Example:
        >>> resolve_timeout(2), resolve_timeout(None)
        (2.0, None)
    """
    if timeout is None:
        return None
    if timeout is not ...:
        return _seconds(timeout, "timeout")
    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if text.lower() == "none":
        return None
    return _seconds(text, ENVIRONMENT_VARIABLE) if text else DEFAULT_SECONDS


def _seconds(value: float | str, name: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = 0.0
    # NaN fails this comparison too.
    if not 0.0 < seconds <= threading.TIMEOUT_MAX:
        none = "None" if name == "timeout" else "none"
        raise MisuseError(
            f"expected {name} to be a positive number of seconds (at most {threading.TIMEOUT_MAX:.0f}) "
            f"or {none} to wait forever, got {value!r}"
        )
    return seconds
