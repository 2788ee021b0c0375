"""Where eps goes: into the variance by a sum, or under it as a floor."""

from typing import Literal, cast, get_args

EpsMode = Literal["plus", "clamp"]

_MODES = get_args(EpsMode)  # torch 2.4 cannot compile the call

_default: EpsMode = "plus"


def set_sbn_eps_mode(mode: EpsMode) -> None:
    """Set what ``eps_mode=None`` means, for every layer built with None, now and later.

    Args:
        mode: ``"plus"`` for ``sqrt(var + eps)``, torch's and the default; ``"clamp"`` for
            ``sqrt(max(var, eps))``, for checkpoints trained that way.

    Raises:
        ValueError: if ``mode`` is neither.

    Example:
        >>> set_sbn_eps_mode("clamp")
        >>> set_sbn_eps_mode("plus")
    """
    global _default
    _default = check_eps_mode(mode)


def check_eps_mode(mode: str) -> EpsMode:
    """Return ``mode`` where it is an eps mode, else raise ValueError."""
    if mode not in _MODES:
        raise ValueError(f"expected eps_mode 'plus' or 'clamp', got {mode!r}")
    return cast(EpsMode, mode)


def resolve_eps_mode(mode: EpsMode | None) -> EpsMode:
    """Return ``mode``, or what None means at this moment; ValueError where it is neither."""
    return _default if mode is None else check_eps_mode(mode)
