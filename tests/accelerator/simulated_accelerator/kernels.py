"""The operators that torch's CPU lacks, or that its fallback to the CPU would get wrong.

An operator registered here counts as one launch, whatever it calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from simulated_accelerator import batch_norm
from simulated_accelerator.build import native

_library: torch.library.Library | None = None


def register() -> None:
    """Make the kernels known to the dispatcher."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    for name, kernel in _KERNELS.items():
        _library.impl(name, _on_device(name, kernel, _WRITTEN.get(name, ())), "PrivateUse1")


def _on_device(name: str, kernel: Callable[..., Any], written: Collection[str]) -> Callable[..., Any]:
    """Run a kernel on CPU copies of its tensors, and write back those arguments that it changes."""
    parameters = list(inspect.signature(kernel).parameters)
    operator = name.partition(".")[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        own = {**dict(zip(parameters, args)), **kwargs}
        tensors = {key: value for key, value in own.items() if isinstance(value, Tensor)}
        devices = sorted({str(tensor.device) for tensor in tensors.values()})
        if len(devices) != 1:
            raise RuntimeError(f"expected all tensors on the same device, got {devices} in {operator}")
        device = next(iter(tensors.values())).device
        if operator in _PASSES:
            batch_norm.expect_layout(tensors["x"], tensors.get("dy"))
        addresses = {key: tensor.untyped_storage().data_ptr() for key, tensor in tensors.items()}
        native().launch(
            operator,
            device.index,
            [address for key, address in addresses.items() if key not in written],
            [address for key, address in addresses.items() if key in written],
        )
        before = native().exchange_quiet(True)
        try:
            copies = {**own, **{key: tensor.cpu() for key, tensor in tensors.items()}}
            results = kernel(**copies)
            for key in written:
                if key in tensors:
                    tensors[key].copy_(copies[key])
            if "out" in own:
                return own["out"]
            every = results if isinstance(results, tuple) else (results,)
            moved = tuple(None if t is None else _moved(t, device) for t in every)
        finally:
            native().exchange_quiet(before)
        for tensor in moved:
            if tensor is not None:
                native().created(operator, device.index, tensor.untyped_storage().data_ptr())
        return moved if isinstance(results, tuple) else moved[0]

    return run


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return like.copy_(tensor)


def convolution_overrideable(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    """As on the CPU: torch asks accelerators for a convolution of their own."""
    return torch.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups)


def convolution_backward_overrideable(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
) -> tuple[Tensor | None, ...]:
    """As on the CPU: torch asks accelerators for a convolution of their own."""
    backward = torch.ops.aten.convolution_backward
    channels = w.shape[1] * groups if transposed else w.shape[0]
    return tuple(
        backward(
            dy, x, w, [channels], stride, padding, dilation, transposed, output_padding, groups, output_mask
        )
    )


_KERNELS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": batch_norm.batch_norm_stats,
    "batch_norm_gather_stats_with_counts": batch_norm.batch_norm_gather_stats_with_counts,
    "batch_norm_elemt": batch_norm.batch_norm_elemt,
    "batch_norm_elemt.out": batch_norm.batch_norm_elemt_out,
    "batch_norm_backward_reduce": batch_norm.batch_norm_backward_reduce,
    "batch_norm_backward_elemt": batch_norm.batch_norm_backward_elemt,
    "native_batch_norm": batch_norm.native_batch_norm,
    "batch_norm_update_stats": batch_norm.batch_norm_update_stats,
    "convolution_overrideable": convolution_overrideable,
    "convolution_backward_overrideable": convolution_backward_overrideable,
}

_PASSES = {  # over a whole batch
    "batch_norm_stats",
    "batch_norm_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_backward_elemt",
}
_RUNNING = ("running_mean", "running_var")
_WRITTEN: dict[str, Collection[str]] = {
    "batch_norm_gather_stats_with_counts": _RUNNING,
    "batch_norm_elemt.out": ("out",),
    "native_batch_norm": _RUNNING,
    "batch_norm_update_stats": _RUNNING,
}
