"""The batch-norm kernels of GPUs: what they compute, and which dtypes and layouts they insist on.

Written after torch's documentation and schemas. Arithmetic and statistics are of float32 for halves and
float32, of float64 for float64. An operator registered here counts as one launch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

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
            _expect_layout(tensors["x"], tensors.get("dy"))
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
                native().created(device.index, tensor.untyped_storage().data_ptr())
        return moved if isinstance(results, tuple) else moved[0]

    return run


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return like.copy_(tensor)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _like(y: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(y)


def _expect(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise RuntimeError(f"expected {name} of {dtype}, as a GPU's kernel does, got {tensor.dtype}")


def _expect_layout(x: Tensor, dy: Tensor | None) -> None:
    """The kernels know contiguous and channels-last tensors, and read dy as if it were laid out as x."""
    if x.numel() == 0:
        return
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    layouts = [torch.contiguous_format, *([channels_last] if channels_last is not None else [])]
    if not any(x.is_contiguous(memory_format=layout) for layout in layouts):
        raise RuntimeError(
            f"expected x contiguous or channels_last, as a GPU's kernel does, got strides {x.stride()}"
        )
    if dy is not None and _strides(dy) != _strides(x):
        raise RuntimeError(
            f"expected dy in the layout of x, strides {x.stride()}, as a GPU's kernel does, got {dy.stride()}"
        )


def _strides(x: Tensor) -> list[int]:
    """Those that matter: along an axis of length 1 nobody steps."""
    return [stride for stride, size in zip(x.stride(), x.shape) if size > 1]


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x -> mean, invstd``, ``(C,)`` each."""
    wide = x.to(_arithmetic(x))
    mean = wide.mean(_axes(x))
    var = (wide - _along(mean, x)).square().mean(_axes(x))
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """``(R, C)`` statistics of R shards -> mean, invstd of all; moves the running statistics.

    A shard that is empty and first makes 0 / 0 of the merge, here as there.
    """
    scalar = x.dtype if running_mean is None else running_mean.dtype
    accumulate = torch.float32 if scalar in (torch.float16, torch.bfloat16) else scalar
    _expect(accumulate, means=means, invstds=invstds)
    _expect(scalar, running_mean=running_mean, running_var=running_var, counts=counts)
    mean, var, n = torch.zeros_like(means[0]), torch.zeros_like(means[0]), means.new_zeros(())
    for shard_mean, invstd, count in zip(means, invstds, counts.view(-1).to(accumulate)):
        factor = 1.0 / (n + count)
        deviation = (1.0 / invstd).square() - eps
        var = var + deviation * count + (mean - shard_mean).square() * n * count * factor
        mean = n * factor * mean + count * factor * shard_mean
        n = n + count
    if running_mean is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
    if running_var is not None:
        running_var.copy_((1 - momentum) * running_var + momentum * (var / (n - 1)))
    return mean, (var / n + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    """``(x - mean) * invstd * weight + bias``, as x in dtype and layout."""
    _expect(_arithmetic(x), mean=mean, invstd=invstd)
    _expect_one_dtype(x, weight=weight, bias=bias)
    y = (x.to(mean.dtype) - _along(mean, x)) * _along(invstd, x)
    if weight is not None:
        y = y * _along(weight.to(y.dtype), x)
    if bias is not None:
        y = y + _along(bias.to(y.dtype), x)
    return _like(y, x)


def _expect_one_dtype(x: Tensor, **parameters: Tensor | None) -> None:
    """Weight and bias are of one dtype: that of x or that of the arithmetic."""
    dtypes = {parameter.dtype for parameter in parameters.values() if parameter is not None}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, _arithmetic(x)}:
        raise RuntimeError(
            f"expected {' and '.join(parameters)} of {x.dtype} or {_arithmetic(x)}, as a GPU's kernel does, "
            f"got {sorted(map(str, dtypes))}"
        )


def batch_norm_elemt_out(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """`batch_norm_elemt` into a tensor that exists."""
    out.copy_(batch_norm_elemt(x, weight, bias, mean, invstd, eps))


def batch_norm_backward_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor | None, ...]:
    """The sums of dy and of dy * (x - mean), and of them the gradients of weight and bias."""
    _expect(_arithmetic(x), mean=mean, invstd=invstd)
    _expect(x.dtype, dy=dy)
    _expect_one_dtype(x, weight=weight)
    wide_dy, wide_x = dy.to(mean.dtype), x.to(mean.dtype)
    sum_dy = wide_dy.sum(_axes(x))
    sum_dy_xmu = (wide_dy * (wide_x - _along(mean, x))).sum(_axes(x))
    dtype = mean.dtype if weight is None else weight.dtype
    dweight = (sum_dy_xmu * invstd).to(dtype) if weight_grad else None
    dbias = sum_dy.to(dtype) if bias_grad else None
    return sum_dy if input_grad else None, sum_dy_xmu if input_grad else None, dweight, dbias


def batch_norm_backward_elemt(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    """dx, of the sums and the counts of all shards."""
    _expect(_arithmetic(x), mean=mean, invstd=invstd, weight=weight, sum_dy=sum_dy, sum_dy_xmu=sum_dy_xmu)
    _expect(x.dtype, dy=dy)
    _expect(torch.int32, count=count)
    n = count.sum().to(mean.dtype)
    wide_dy, wide_x = dy.to(mean.dtype), x.to(mean.dtype)
    slope = invstd * invstd * sum_dy_xmu / n
    dx = wide_dy - _along(sum_dy / n, x) - (wide_x - _along(mean, x)) * _along(slope, x)
    return _like(dx * _along(invstd if weight is None else invstd * weight, x), x)


def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """As on the CPU; here because its schema hides from torch's fallback that it moves running statistics."""
    return tuple(torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps))


def batch_norm_update_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, ...]:
    """As on the CPU, and here for the same reason as `native_batch_norm`."""
    return tuple(torch.batch_norm_update_stats(x, running_mean, running_var, momentum))


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
    "batch_norm_stats": batch_norm_stats,
    "batch_norm_gather_stats_with_counts": batch_norm_gather_stats_with_counts,
    "batch_norm_elemt": batch_norm_elemt,
    "batch_norm_elemt.out": batch_norm_elemt_out,
    "batch_norm_backward_reduce": batch_norm_backward_reduce,
    "batch_norm_backward_elemt": batch_norm_backward_elemt,
    "native_batch_norm": native_batch_norm,
    "batch_norm_update_stats": batch_norm_update_stats,
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
