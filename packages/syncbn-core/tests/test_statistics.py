"""The arithmetic on statistics against NumPy: sums per channel, mean and m2, and how they merge."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn_core._kernels import PLAIN, cpu, kernels_of
from syncbn_core._kernels.plain import normalize
from syncbn_core._kernels.statistics import (
    local_statistics,
    merge_stacked,
    merge_statistics,
    sum_over_batch,
    unsqueeze_channels,
)

SHAPES = [(5, 3), (5, 3, 4), (5, 3, 4, 2), (5, 3, 4, 2, 3)]
EPS = 1e-5


@pytest.fixture(params=["plain", "cpu", "cpu, one thread", "cpu, more than a cache holds"])
def statistics(request, monkeypatch):
    """Every function that computes the statistics of one batch here."""
    threads = torch.get_num_threads()
    if request.param == "cpu, one thread":  # as in replicas; some kernels then add up more numbers in a row
        torch.set_num_threads(1)
    if request.param == "cpu, more than a cache holds":
        monkeypatch.setattr(cpu, "_FEW", 0)
        monkeypatch.setattr(cpu, "_IN_CACHE", 0)
    kernels = PLAIN if request.param == "plain" else kernels_of(torch.device("cpu"))
    yield lambda x: kernels.local_statistics(x, EPS)
    torch.set_num_threads(threads)


def by_numpy(x):
    """Mean and m2 per channel of ``(N, C, *)``."""
    rows = np.moveaxis(np.asarray(x.double()), 1, -1).reshape(-1, x.shape[1])
    mean = rows.mean(0)
    return mean, ((rows - mean) ** 2).sum(0)


def count_of(x):
    """The number of values of ``(N, C, *)`` per channel."""
    return x[:, 0].numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_over_batch_leaves_the_channels(shape):
    x = torch.randn(shape, dtype=torch.float64)
    expected = np.moveaxis(x.numpy(), 1, -1).reshape(-1, 3).sum(0)
    np.testing.assert_allclose(sum_over_batch(x), expected, rtol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unsqueeze_channels_views_the_vector_along_the_channels(shape):
    vector = torch.arange(3.0)
    column = unsqueeze_channels(vector, torch.empty(shape))
    assert column.data_ptr() == vector.data_ptr()
    assert torch.equal(column.expand(shape).movedim(1, -1), vector.expand(5, *shape[2:], 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_local_statistics_are_those_of_numpy(shape, statistics):
    x = torch.randn(shape, dtype=torch.float64) * 2 - 1
    np.testing.assert_allclose(statistics(x), by_numpy(x), rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 2), (2, 3, 0, 4)], ids=str)
def test_local_statistics_of_nothing_are_zeros(shape, statistics):
    np.testing.assert_array_equal(statistics(torch.empty(shape)), np.zeros((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_local_statistics_of_half_inputs_have_the_digits_of_float32(dtype, memory_format, statistics):
    x = torch.randn(4, 3, 20, 20).to(dtype, memory_format=memory_format)
    np.testing.assert_allclose(statistics(x), by_numpy(x), rtol=1e-5, atol=1e-6)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((64, 5), torch.contiguous_format),
        ((16, 5, 28, 28), torch.contiguous_format),
        ((16, 5, 28, 28), torch.channels_last),
        ((8, 5, 6, 14, 14), torch.channels_last_3d),
        ((4, 3, 160, 160), torch.channels_last),
    ],
    ids=str,
)
@pytest.mark.parametrize(("mean", "std"), [(100.0, 0.01), (1e4, 1.0), (1e6, 1.0), (-1e6, 1.0)])
def test_a_mean_far_from_zero_costs_the_variance_no_digits(mean, std, shape, memory_format, statistics):
    x = (torch.randn(shape, dtype=torch.float64) * std + mean).float().contiguous(memory_format=memory_format)
    chunks = x.tensor_split([1, shape[0] // 3])
    replicas = [statistics(chunk) for chunk in chunks]
    wide = [(mean.double(), m2.double()) for mean, m2 in replicas]
    merged_mean, m2 = merge_statistics(wide, [count_of(chunk) for chunk in chunks])
    expected_mean, expected_m2 = by_numpy(x)
    np.testing.assert_allclose(m2, expected_m2, rtol=1e-4)
    np.testing.assert_allclose(merged_mean, expected_mean, atol=1e-3 * std)


def test_constant_channels_have_no_variance(statistics):
    x = torch.tensor([0.1, -7.3, 1e6]).expand(50, 3)
    mean, m2 = statistics(x)
    np.testing.assert_allclose(mean.double(), x[0].double(), rtol=1e-7)
    assert (m2 / 50 <= 1e-12 * mean**2).all()
    assert (m2 >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any),
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(1e-2, 1e2),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_statistics_are_those_of_the_union(sizes, offset, scale, seed):
    batch = torch.randn(sum(sizes), 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    batch = batch * scale + offset
    parts = [local_statistics(part) for part in batch.split(sizes)]
    counts = [2 * size for size in sizes]
    np.testing.assert_allclose(merge_statistics(parts, counts), by_numpy(batch), rtol=1e-9)

    means, m2s = (torch.stack(each) for each in zip(*parts))
    column = torch.tensor(counts, dtype=torch.float64).unsqueeze(1)
    *merged, count = merge_stacked(means, m2s, column)
    np.testing.assert_allclose(merged, by_numpy(batch), rtol=1e-9)
    assert count.tolist() == [count_of(batch)]


def test_merging_nothing_gives_zeros():
    nothing = torch.zeros(4)
    assert all(torch.equal(each, nothing) for each in merge_statistics([(nothing, nothing)] * 3, [0] * 3))
    mean, m2, count = merge_stacked(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 1))
    assert torch.equal(mean, nothing)
    assert torch.equal(m2, nothing)
    assert count.tolist() == [0]


@pytest.mark.parametrize("weight", [None, torch.tensor([2.0, 3.0, -1.0])])
@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, 0.0, 5.0])])
def test_normalize_is_the_formula(weight, bias):
    x, mean, invstd = torch.randn(4, 3, 2).double(), torch.randn(3).double(), torch.rand(3).double()
    w = np.ones(3) if weight is None else weight.numpy()
    b = np.zeros(3) if bias is None else bias.numpy()
    expected = (np.moveaxis(x.numpy(), 1, -1) - mean.numpy()) * invstd.numpy() * w + b
    np.testing.assert_allclose(normalize(x, mean, invstd, weight, bias).movedim(1, -1), expected, rtol=1e-12)
