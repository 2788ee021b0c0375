"""Autocast: convolutions and products run in the lower precision, batch norms in that of their input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = pytest.mark.usefixtures("accelerator")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_and_linear_run_in_the_half_type(dtype: torch.dtype) -> None:
    conv, linear = nn.Conv2d(3, 4, 3).to("sim:1"), nn.Linear(4, 2).to("sim:1")
    x = torch.randn(2, 3, 5, 5, device="sim:1")
    with torch.autocast("sim", dtype=dtype):
        y = conv(x)
        z = linear(y.mean((2, 3)))
    assert (y.dtype, z.dtype) == (dtype, dtype)
    z.float().square().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), conv(x), rtol=0.05, atol=0.05)


def test_a_loss_runs_in_float32() -> None:
    with torch.autocast("sim", dtype=torch.float16):
        logits = torch.randn(4, 3, device="sim:0", dtype=torch.float16)
        loss = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long, device="sim:0"))
    assert loss.dtype == torch.float32


def test_outside_nothing_is_cast() -> None:
    linear, x = nn.Linear(4, 2).to("sim:1"), torch.randn(3, 4, device="sim:1")
    with torch.autocast("sim", enabled=False):
        assert linear(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x).dtype == torch.float32
