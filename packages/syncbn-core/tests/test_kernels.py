"""The fused kernels compute what the plain operations say, whatever the layout of what they are given."""

import pytest
import torch

from syncbn_core import _cpu, _kernels, _statistics
from syncbn_core._statistics import compute_dtype, sum_over_batch, unsqueeze_channels

C = 3
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(params=["in a cache", "beyond it"], autouse=True)
def _size_of_the_cache(request, monkeypatch):
    if request.param == "beyond it":
        monkeypatch.setattr(_cpu, "_IN_CACHE", 0)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_other(x):
    return torch.stack([x, torch.full_like(x, 7)], -1).flatten(-2)[..., ::2]


def backwards(x):
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "every other": every_other,
    "a slice of more channels": lambda x: torch.cat([x, x], 1)[:, :C],
    "backwards": backwards,
    "expanded": lambda x: x[:1].expand_as(x),
}
SHAPES = [(6, C), (4, C, 5), (4, C, 5, 2), (2, C, 3, 2, 4)]
INPUTS = pytest.mark.parametrize("x_layout", LAYOUTS)
GRADIENTS = pytest.mark.parametrize("dy_layout", LAYOUTS)
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape, dtype, layout):
    return LAYOUTS[layout](torch.randn(shape).to(dtype))


def vectors(number):
    """Vectors of length C in the dtype in which they are merged."""
    return torch.rand(number, C, dtype=torch.float64) + 0.5


def forward_vectors(mean, invstd, weight, bias, dtype):
    """What has been agreed on for replicas whose inputs are of ``dtype``."""
    scale = invstd if weight is None else invstd * weight
    return _kernels.forward_vectors(mean, invstd, scale, bias, compute_dtype(dtype))


def backward_vectors(mean, scale, shift, slope, dtype):
    """What replicas whose inputs are of ``dtype`` make their gradients of."""
    cpu = torch.device("cpu")
    return _kernels.backward_vectors(mean, scale, shift, slope, cpu, compute_dtype(dtype))


@SHAPED
@DTYPES
@INPUTS
def test_local_statistics_are_those_of_plain_operations(shape, dtype, x_layout):
    x = make(shape, dtype, x_layout)
    expected = _statistics.local_statistics(x.double())
    # The reference is of float64, so a half's own digits are all that may be missing.
    tolerance = TOLERANCES[dtype] if dtype is torch.float64 else TOLERANCES[torch.float32]
    actual = _kernels.local_statistics(x)
    assert actual.shape == (_kernels._ROWS, C)
    torch.testing.assert_close(actual[:2], expected, **tolerance)


@SHAPED
@DTYPES
@INPUTS
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_normalize_is_plain_arithmetic(shape, dtype, x_layout, affine):
    x = make(shape, dtype, x_layout)
    mean, invstd, weight, bias = vectors(4)
    weight, bias = (weight.to(dtype), bias.to(dtype)) if affine else (None, None)
    y = _kernels.normalize(x, forward_vectors(mean, invstd, weight, bias, dtype), weight, bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y, _statistics.normalize(x, mean, invstd, weight, bias), **TOLERANCES[dtype])


@SHAPED
@DTYPES
@INPUTS
@GRADIENTS
def test_gradient_sums_are_sums_of_float64(shape, dtype, x_layout, dy_layout):
    x, dy = make(shape, dtype, x_layout), make(shape, dtype, dy_layout)
    mean, invstd = vectors(2)
    wide_dy = dy.double()
    expected = torch.stack(
        [sum_over_batch(wide_dy), sum_over_batch(wide_dy * (x.double() - unsqueeze_channels(mean, x)))]
    )
    tolerance = TOLERANCES[dtype] if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    agreed = forward_vectors(mean, invstd, None, None, dtype)
    actual = _kernels.gradient_sums(dy, x, agreed)
    assert actual.shape == agreed.shape  # as autograd wants it of a gradient
    torch.testing.assert_close(actual[:2].double(), expected, **tolerance)


def test_gradient_sums_lose_nothing_to_the_rounding_of_a_mean_far_from_zero():
    x, dy = torch.randn(16, C, 16, 16) + 1e4, torch.randn(16, C, 16, 16) + 1
    mean = x.double().mean((0, 2, 3)) + 0.1
    wide_dy = dy.double()
    expected = torch.stack(
        [sum_over_batch(wide_dy), sum_over_batch(wide_dy * (x.double() - unsqueeze_channels(mean, x)))]
    )
    agreed = forward_vectors(mean, vectors(1)[0], None, None, x.dtype)
    actual = _kernels.gradient_sums(dy, x, agreed)[:2].double()
    # Of 4096 terms of order 1, each of which that rounding changes by up to 5e-4.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)


@SHAPED
@DTYPES
@INPUTS
@pytest.mark.parametrize("dy_layout", [*LAYOUTS, None])
def test_input_gradient_is_plain_arithmetic(shape, dtype, x_layout, dy_layout):
    x = make(shape, dtype, x_layout)
    dy = None if dy_layout is None else make(shape, dtype, dy_layout)
    mean, a, shift, slope = vectors(4)
    coefficients = backward_vectors(mean, a, shift, slope, dtype)
    assert coefficients.shape == (_kernels._ROWS, C)
    dx = _kernels.input_gradient(dy, x, coefficients)
    mean, a, shift, slope = (unsqueeze_channels(vector, x) for vector in (mean, a, shift, slope))
    wide_dy = torch.zeros(shape, dtype=torch.float64) if dy is None else dy.double()
    expected = a * (wide_dy - shift - slope * (x.double() - mean))
    assert dx.dtype == dtype
    torch.testing.assert_close(dx, expected.to(dtype), **TOLERANCES[dtype])


@DTYPES
@pytest.mark.parametrize("shape", [(0, C), (0, C, 5, 2), (2, C, 0, 4)], ids=str)
def test_no_kernel_minds_an_empty_batch(shape, dtype):
    x, dy = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    mean, invstd, slope = vectors(3)
    agreed = forward_vectors(mean, invstd, None, None, dtype)
    nothing = torch.zeros(_kernels._ROWS, C)
    assert torch.equal(_kernels.local_statistics(x), nothing.double())
    assert torch.equal(_kernels.gradient_sums(dy, x, agreed), nothing.to(agreed.dtype))
    for result in (
        _kernels.normalize(x, agreed, None, None),
        _kernels.input_gradient(dy, x, backward_vectors(mean, invstd, mean, slope, dtype)),
    ):
        assert result.shape == shape
        assert result.dtype == dtype


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_big_outputs_have_the_layout_of_the_input(layout):
    x = make((4, C, 5, 2), torch.float32, layout)
    mean, a, slope = vectors(3)
    y = _kernels.normalize(x, forward_vectors(mean, a, None, None, x.dtype), None, None)
    dy = make(x.shape, x.dtype, "backwards")
    dx = _kernels.input_gradient(dy, x, backward_vectors(mean, a, mean, slope, x.dtype))
    assert x.stride() == y.stride() == dx.stride()
