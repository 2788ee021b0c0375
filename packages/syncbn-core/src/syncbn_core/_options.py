"""The eps mode: eps is added to the variance, or is the floor of the variance."""

from __future__ import annotations

from typing import Literal, cast, get_args

EpsMode = Literal["plus", "clamp", "clamp_synchronized"]

_MODES = get_args(EpsMode)  # torch 2.4 cannot compile the call

_default: EpsMode = "plus"


def set_sbn_eps_mode(mode: EpsMode) -> None:
    """Set what ``eps_mode=None`` means, for every layer built with None, now and later.

    Args:
        mode: ``"plus"`` for ``sqrt(var + eps)``, as torch does and the default. ``"clamp"`` for
            ``sqrt(max(var, eps))``. ``"clamp_synchronized"`` for ``"clamp"`` where a layer synchronizes, and
            ``"plus"`` elsewhere, as in vendored ``sync_batchnorm`` folders.

    Raises:
        ValueError: ``mode`` is none of these.

    Example:
        >>> set_sbn_eps_mode("clamp")
        >>> set_sbn_eps_mode("plus")
    """
    global _default
    _default = check_eps_mode(mode)


def check_eps_mode(mode: str) -> EpsMode:
    """Return ``mode`` if it is an eps mode; otherwise raise ValueError."""
    if mode not in _MODES:
        expected = ", ".join(map(repr, _MODES))
        raise ValueError(f"expected eps_mode to be one of {expected}, got {mode!r}")
    return cast(EpsMode, mode)


def clamps(mode: EpsMode | None, synchronizes: bool) -> bool:
    """Whether a layer of this ``eps_mode`` uses eps as a floor.

    Args:
        mode: the layer's; None for what `set_sbn_eps_mode` has set.
        synchronizes: whether this call synchronizes over replicas or processes.

    Raises:
        ValueError: ``mode`` is not an eps mode.
    """
    resolved = _default if mode is None else check_eps_mode(mode)
    return resolved == "clamp" or (resolved == "clamp_synchronized" and synchronizes)
