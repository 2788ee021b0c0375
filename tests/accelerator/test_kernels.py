"""The batch-norm kernels: the numbers of torch's own batch norm, and the demands of CUDA's kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.usefixtures("accelerator")

HALVES = [torch.float16, torch.bfloat16]


def kernels(shards: list[Tensor], grads: list[Tensor], weight: Tensor, bias: Tensor, running: list[Tensor]):
    """One batch over shards: what `nn.SyncBatchNorm` computes over processes."""
    dtype = torch.float32 if shards[0].dtype in HALVES else shards[0].dtype
    stats = [torch.batch_norm_stats(x, 1e-5) for x in shards]
    counts = torch.tensor([x.numel() / x.shape[1] for x in shards], device="sim:1", dtype=running[0].dtype)
    means, invstds = (torch.stack(rows) for rows in zip(*stats))
    mean, invstd = torch.batch_norm_gather_stats_with_counts(
        shards[0], means, invstds, *running, 0.1, 1e-5, counts
    )
    y = [torch.batch_norm_elemt(x, weight, bias, mean, invstd, 1e-5) for x in shards]
    sums = [
        torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, True, True)
        for dy, x in zip(grads, shards)
    ]
    sum_dy, sum_dy_xmu, dweight, dbias = (sum(parts) for parts in zip(*sums))
    dx = [
        torch.batch_norm_backward_elemt(
            dy, x, mean, invstd, weight.to(dtype), sum_dy, sum_dy_xmu, counts.to(torch.int32)
        )
        for dy, x in zip(grads, shards)
    ]
    return torch.cat(y), torch.cat(dx), dweight, dbias, *running


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_they_are_torchs_batch_norm_of_the_whole_batch(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = (torch.randn(6, 3, 4, 5, dtype=dtype) * 2 + 1).contiguous(memory_format=layout).requires_grad_()
    dy = torch.randn(6, 3, 4, 5, dtype=dtype).contiguous(memory_format=layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.rand(3, dtype=wide).requires_grad_() for _ in range(2))
    running = [torch.rand(3, dtype=wide) for _ in range(2)]
    there = [t.detach().to("sim:1") for t in (x, dy, weight, bias, *running)]
    actual = kernels(there[0].split([1, 5]), there[1].split([1, 5]), *there[2:4], there[4:])
    y = F.batch_norm(x.to(wide), *running, weight, bias, True, 0.1, 1e-5)
    y.backward(dy.to(wide))
    expected = [y.to(dtype), x.grad, weight.grad, bias.grad, *running]
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype in HALVES else {}
    torch.testing.assert_close([t.cpu() for t in actual], expected, **tolerance)
    assert actual[0].is_contiguous(memory_format=layout)


def test_an_empty_shard_that_comes_first_makes_nan_of_the_merge() -> None:
    x, zeros, ones = (torch.ones(2, 3, device="sim:1") * value for value in (1, 0, 1))
    counts = torch.tensor([0.0, 4.0], device="sim:1")
    merge = torch.batch_norm_gather_stats_with_counts
    mean, _ = merge(x, zeros, ones, None, None, 0.1, 0.0, counts)
    assert mean.isnan().all()
    mean, invstd = merge(x, ones, ones, None, None, 0.1, 0.0, counts.clamp(min=1e-30))
    assert (mean.tolist(), invstd.tolist()) == ([1.0] * 3, [1.0] * 3)


def test_a_variance_of_zero_has_no_reciprocal_without_eps() -> None:
    x = torch.ones(4, 3, device="sim:2")
    assert torch.batch_norm_stats(x, 0.0)[1].tolist() == [0.0] * 3
    assert torch.batch_norm_stats(x, 0.25)[1].tolist() == [2.0] * 3


class TestDemands:
    """Each call is right but for one argument."""

    def setup_method(self) -> None:
        self.x = torch.rand(4, 3, 2, 2, device="sim:0")
        self.half = self.x.half()
        self.v = torch.rand(3, device="sim:0")
        self.rows = torch.rand(2, 3, device="sim:0")
        self.counts = torch.ones(2, device="sim:0")
        self.int_counts = torch.ones(2, dtype=torch.int32, device="sim:0")

    def merge(self, x: Tensor, rows: Tensor, running: Tensor | None, counts: Tensor) -> None:
        torch.batch_norm_gather_stats_with_counts(x, rows, rows, running, running, 0.1, 1e-5, counts)

    def test_counts_have_the_dtype_of_the_running_statistics(self) -> None:
        self.merge(self.half, self.rows, self.v, self.counts)
        with pytest.raises(RuntimeError, match=r"expected counts of torch\.float32"):
            self.merge(self.half, self.rows, self.v, self.counts.half())

    def test_counts_have_the_dtype_of_the_input_without_running_statistics(self) -> None:
        self.merge(self.half, self.rows, None, self.counts.half())
        with pytest.raises(RuntimeError, match=r"expected counts of torch\.float16"):
            self.merge(self.half, self.rows, None, self.counts)

    def test_statistics_to_merge_have_the_dtype_of_the_arithmetic(self) -> None:
        with pytest.raises(RuntimeError, match=r"expected means of torch\.float32"):
            self.merge(self.x, self.rows.double(), self.v, self.counts)

    def test_a_half_is_normalized_by_float32(self) -> None:
        torch.batch_norm_elemt(self.half, self.v, self.v, self.v, self.v, 0.0)
        with pytest.raises(RuntimeError, match=r"expected mean of torch\.float32"):
            torch.batch_norm_elemt(self.half, self.v, self.v, self.v.half(), self.v.half(), 0.0)

    def test_a_gradient_has_the_layout_of_its_input(self) -> None:
        dy = self.x.contiguous(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match="expected dy in the layout of x"):
            torch.batch_norm_backward_reduce(dy, self.x, self.v, self.v, self.v, True, True, True)
        with pytest.raises(RuntimeError, match="expected dy in the layout of x"):
            self.input_gradient(dy=dy)

    def test_an_input_is_contiguous_or_channels_last(self) -> None:
        with pytest.raises(RuntimeError, match="expected x contiguous or channels_last"):
            torch.batch_norm_stats(self.x.transpose(2, 3)[:, :, :1], 0.0)

    def test_an_input_gradient_takes_counts_of_int32(self) -> None:
        self.input_gradient()
        with pytest.raises(RuntimeError, match=r"expected count of torch\.int32"):
            self.input_gradient(counts=self.counts)

    def test_an_input_gradient_takes_the_weight_in_the_dtype_of_the_arithmetic(self) -> None:
        with pytest.raises(RuntimeError, match=r"expected weight of torch\.float32"):
            self.input_gradient(weight=self.v.half())

    def input_gradient(
        self, dy: Tensor | None = None, weight: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        dy = self.x if dy is None else dy
        weight = self.v if weight is None else weight
        counts = self.int_counts if counts is None else counts
        torch.batch_norm_backward_elemt(dy, self.x, self.v, self.v, weight, self.v, self.v, counts)
