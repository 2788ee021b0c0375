"""The kernels agree with float64 arithmetic, in every dtype and every memory layout."""

import pytest
import torch

from syncbn_core import SynchronizedBatchNorm1d
from syncbn_core._kernels import PLAIN, cpu, kernels_of
from syncbn_core._kernels.protocol import InputGradient
from syncbn_core._kernels.statistics import compute_dtype, sum_over_batch, unsqueeze_channels

C = 3
EPS = 1e-5
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(params=["cpu", "cpu, large tensors", "plain"], autouse=True)
def kernels(request, monkeypatch):
    """Every set of kernels that runs here; the CPU's also in its mode for large tensors."""
    if request.param == "plain":
        return PLAIN
    if request.param == "cpu, large tensors":
        monkeypatch.setattr(cpu, "_FEW", 0)
        monkeypatch.setattr(cpu, "_IN_CACHE", 0)
    return kernels_of(torch.device("cpu"))


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
SHAPES = [(6, C), (4, C, 5, 2), (2, C, 3, 2, 4)]
INPUTS = pytest.mark.parametrize("x_layout", LAYOUTS)
GRADIENTS = pytest.mark.parametrize("dy_layout", LAYOUTS)
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape, dtype, layout):
    return LAYOUTS[layout](torch.randn(shape).to(dtype))


def vectors(number, dtype):
    """Vectors of length C in the dtype of the arithmetic on inputs of ``dtype``."""
    return (torch.rand(number, C, dtype=torch.float64) + 0.5).to(compute_dtype(dtype)).unbind()


def column(vector, like):
    return unsqueeze_channels(vector.double(), like)


def float32_at_least(dtype):
    return TOLERANCES[dtype] if dtype is torch.float64 else TOLERANCES[torch.float32]


@pytest.mark.pairwise
@SHAPED
@DTYPES
@INPUTS
def test_local_statistics_are_mean_and_m2(shape, dtype, x_layout, kernels):
    x = make(shape, dtype, x_layout)
    mean, m2 = kernels.local_statistics(x, EPS)
    wide = x.double()
    expected_mean = sum_over_batch(wide) * C / x.numel()
    expected_m2 = sum_over_batch((wide - column(expected_mean, x)) ** 2)
    # Only the rounding of half inputs is allowed.
    torch.testing.assert_close(mean.double(), expected_mean, **float32_at_least(dtype))
    torch.testing.assert_close(m2.double(), expected_m2, **float32_at_least(dtype))


@pytest.mark.pairwise
@SHAPED
@DTYPES
@INPUTS
def test_normalize_is_the_formula(shape, dtype, x_layout, kernels):
    x = make(shape, dtype, x_layout)
    mean, invstd, weight, bias = vectors(4, dtype)
    weight, bias = weight.to(dtype), bias.to(dtype)
    plain = (x.double() - column(mean, x)) * column(invstd, x)
    affine = plain * column(weight, x) + column(bias, x)
    for parameters, expected in (((weight, bias), affine), ((None, None), plain)):
        out = torch.full_like(x, 7)
        for y in (
            kernels.normalize(x, mean, invstd, *parameters),
            kernels.normalize(x, mean, invstd, *parameters, out=out),
            out,
        ):
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected.to(dtype), **TOLERANCES[dtype])


def exact_sums(dy, x, mean):
    dy = dy.double()
    return sum_over_batch(dy), sum_over_batch(dy * (x.double() - column(mean, x)))


@pytest.mark.pairwise
@SHAPED
@DTYPES
@INPUTS
@GRADIENTS
def test_gradient_sums_are_those_of_float64(shape, dtype, x_layout, dy_layout, kernels):
    x, dy = make(shape, dtype, x_layout), make(shape, dtype, dy_layout)
    mean, invstd = vectors(2, dtype)
    tolerance = TOLERANCES[dtype] if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    sums = kernels.gradient_sums(dy, x, mean, invstd)
    assert all(each.dtype == mean.dtype for each in sums)
    torch.testing.assert_close(tuple(each.double() for each in sums), exact_sums(dy, x, mean), **tolerance)


def test_gradient_sums_of_a_mean_far_from_zero_have_the_digits_of_float32(kernels):
    x, dy = torch.randn(16, C, 16, 16) + 1e4, torch.randn(16, C, 16, 16) + 1
    mean = x.double().mean((0, 2, 3)).float()
    sums = kernels.gradient_sums(dy, x, mean, torch.ones(C))
    torch.testing.assert_close(
        tuple(each.double() for each in sums), exact_sums(dy, x, mean), rtol=1e-4, atol=1e-2
    )


@pytest.mark.pairwise
@SHAPED
@DTYPES
@INPUTS
@pytest.mark.parametrize("dy_layout", [*LAYOUTS, None])
def test_input_gradient_is_the_formula(shape, dtype, x_layout, dy_layout, kernels):
    x = make(shape, dtype, x_layout)
    dy = None if dy_layout is None else make(shape, dtype, dy_layout)
    mean, invstd, weight, sum_dy, sum_dy_xmu = vectors(5, dtype)
    weight, n = weight.to(dtype), 7
    wide_dy = torch.zeros(shape, dtype=torch.float64) if dy is None else dy.double()
    by_way_of_var = (x.double() - column(mean, x)) * column(invstd, x) ** 2 * column(sum_dy_xmu, x) / n
    plain = column(invstd, x) * (wide_dy - column(sum_dy, x) / n - by_way_of_var)
    for w, expected in ((weight, plain * column(weight, x)), (None, plain)):
        dx = kernels.input_gradient(dy, x, InputGradient(mean, invstd, w, sum_dy, sum_dy_xmu, n))
        assert dx.dtype == dtype
        torch.testing.assert_close(dx, expected.to(dtype), **TOLERANCES[dtype])


@DTYPES
@pytest.mark.parametrize("shape", [(0, C), (0, C, 5, 2), (2, C, 0, 4)], ids=str)
def test_every_kernel_accepts_an_empty_batch(shape, dtype, kernels):
    x, dy = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    mean, invstd, weight, sum_dy, sum_dy_xmu = vectors(5, dtype)
    for vector in (*kernels.local_statistics(x, EPS), *kernels.gradient_sums(dy, x, mean, invstd)):
        assert torch.equal(vector, torch.zeros_like(vector))
        assert vector.shape == (C,)
    given = InputGradient(mean, invstd, weight, sum_dy, sum_dy_xmu, 4)
    for result in (
        kernels.normalize(x, mean, invstd, None, None),
        kernels.normalize(x, mean, invstd, None, None, out=torch.empty_like(x)),
        kernels.input_gradient(dy, x, given),
        kernels.input_gradient(None, x, given),
    ):
        assert result.shape == shape
        assert result.dtype == dtype


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_outputs_have_the_layout_of_the_input(layout, dtype, kernels):
    x = make((4, C, 5, 2), dtype, layout)
    mean, invstd, sum_dy, sum_dy_xmu = vectors(4, dtype)
    y = kernels.normalize(x, mean, invstd, None, None)
    dy = make(x.shape, x.dtype, "backwards")
    dx = kernels.input_gradient(dy, x, InputGradient(mean, invstd, None, sum_dy, sum_dy_xmu, 4))
    assert x.stride() == y.stride() == dx.stride()


# The merge


@pytest.mark.pairwise
@DTYPES
@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracking", "untracked"])
@pytest.mark.parametrize("sizes", [[5], [3, 3], [2, 0, 4, 1]], ids=str)
def test_merge_makes_the_statistics_of_the_whole_batch(
    sizes, track_running_stats, momentum, eps_mode, dtype, kernels
):
    layer = SynchronizedBatchNorm1d(
        C, 0.5, momentum, eps_mode=eps_mode, track_running_stats=track_running_stats, dtype=torch.float64
    )
    batch = (torch.randn(sum(sizes), C) * torch.tensor([0.1, 1.0, 3.0]) + 2).to(dtype)
    parts = [kernels.local_statistics(part, layer.eps) for part in batch.split(sizes)]
    whole = kernels.merge(parts, sizes, layer._reduction(parts[0][0], dtype))

    wide = batch.double()
    mean, var = wide.mean(0), wide.var(0, correction=0)
    invstd = (var.clamp(min=0.5) if eps_mode == "clamp" else var + 0.5).rsqrt()
    assert whole.mean.dtype == whole.invstd.dtype == compute_dtype(dtype)
    torch.testing.assert_close(whole.mean.double(), mean, **float32_at_least(dtype))
    torch.testing.assert_close(whole.invstd.double(), invstd, **float32_at_least(dtype))
    assert whole.samples == sum(sizes)
    if eps_mode == "clamp":
        assert torch.equal(whole.is_floor, var < 0.5)
    if track_running_stats:
        share = 1.0 if momentum is None else momentum
        torch.testing.assert_close(layer.running_mean, share * mean, **float32_at_least(dtype))
        unbiased = 1 - share + share * wide.var(0)
        torch.testing.assert_close(layer.running_var, unbiased, **float32_at_least(dtype))
        assert layer.num_batches_tracked == 1


def test_a_merge_of_empty_batches_updates_no_running_statistics(kernels):
    layer = SynchronizedBatchNorm1d(C)
    parts = [kernels.local_statistics(torch.empty(0, C), layer.eps)] * 2
    whole = kernels.merge(parts, [0, 0], layer._reduction(parts[0][0], torch.float32))
    assert torch.equal(whole.mean, torch.zeros(C))
    assert torch.isfinite(whole.invstd).all()
    assert layer.num_batches_tracked == 0
    torch.testing.assert_close(layer.running_var, torch.ones(C), rtol=0, atol=0)
