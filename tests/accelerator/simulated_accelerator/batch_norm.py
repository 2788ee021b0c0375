"""The batch-norm kernels of GPUs: what they compute, and which dtypes and layouts they insist on.

Written after torch's documentation and schemas. Arithmetic and statistics are of float32 for halves and
float32, of float64 for float64. The functions here work on CPU tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def expect_layout(x: Tensor, dy: Tensor | None) -> None:
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
    """``x -> mean, invstd``, ``(C,)`` each; an invstd of 0, not of infinity, where variance and eps are 0."""
    wide = x.to(_arithmetic(x))
    mean = wide.mean(_axes(x))
    var = (wide - _along(mean, x)).square().mean(_axes(x))
    invstd = (var + eps).rsqrt()
    return mean, invstd.masked_fill(var == 0, 0.0) if eps == 0 else invstd


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
