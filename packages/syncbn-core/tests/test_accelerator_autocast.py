"""Under autocast a layer gets halves from the convolution before it, and normalizes them in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simulated_accelerator.replicas import Step, twin_of, whole_batch_step
from syncbn_core import SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("accelerator")

TOLERANCES = {torch.float16: {"rtol": 0.02, "atol": 0.1}, torch.bfloat16: {"rtol": 0.1, "atol": 0.5}}


@pytest.fixture
def net(layer_of: Callable[..., nn.Module]) -> nn.Module:
    conv = nn.Conv2d(3, 4, 3, padding=1, device="sim:0")
    return nn.Sequential(conv, layer_of(SynchronizedBatchNorm2d, device="sim:0", dtype=torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [[2, 3], [1, 0, 2, 1]], ids=str)
def test_halves_of_autocast_equal_the_whole_batch(
    sizes: list[int], dtype: torch.dtype, net: nn.Module
) -> None:
    twin = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64), twin_of(net[1], 4))
    twin[0].load_state_dict(net[0].state_dict())
    seen: list[torch.dtype] = []

    def call(replica: nn.Module, x: Tensor, rank: int) -> Tensor:
        with torch.autocast("sim", dtype=dtype):  # in the replica's thread, since autocast holds per thread
            hidden = replica[0](x)
            y = replica[1](hidden)
        seen.extend([hidden.dtype, y.dtype])
        return y

    chunks = [torch.randn(size, 3, 6, 5) for size in sizes]
    step = Step(net, chunks, [f"sim:{rank}" for rank in range(len(sizes))], call)
    assert set(seen) == {dtype}
    expected = whole_batch_step(twin, chunks)
    torch.testing.assert_close(step.gave, expected, check_dtype=False, **TOLERANCES[dtype])
    assert {name: p.grad.dtype for name, p in net.named_parameters()} == dict.fromkeys(
        ["0.weight", "0.bias", "1.weight", "1.bias"], torch.float32
    )
    for counts in step.counts:
        assert (counts.reads, counts.waits) == (0, 0), counts
