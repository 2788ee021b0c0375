"""What ``torch.autocast("sim")`` needs: which operators run in the lower precision, and which in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_KEY = "AutocastPrivateUse1"

LOWER_PRECISION = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
)
"""The operators of convolutions and products of matrices, as on CUDA."""

FLOAT32 = ("mse_loss", "cross_entropy_loss", "nll_loss", "log_softmax.int", "softmax.int")
"""Those that need range or precision; some of those of CUDA."""

_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make autocast known to the dispatcher; every operator that is not named falls through."""
    every = torch.library.Library("_", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, _KEY)
    named = torch.library.Library("aten", "IMPL")
    for name in LOWER_PRECISION:
        named.impl(name, _casting(name, lambda: torch.get_autocast_dtype("sim")), _KEY)
    for name in FLOAT32:
        named.impl(name, _casting(name, lambda: torch.float32), _KEY)
    _libraries.extend([every, named])


def _casting(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def run(*args: Any, **kwargs: Any) -> Any:
        to = dtype()
        with torch.autocast("sim", enabled=False):
            return operator(*[_cast(a, to) for a in args], **{key: _cast(a, to) for key, a in kwargs.items()})

    return run


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type == "sim":
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    return value
