"""With half inputs, the error of the input gradient is at most 1.5 times that of torch's own layer."""

import pytest
import torch
from torch import nn

from syncbn_core import SynchronizedBatchNorm2d

pytestmark = pytest.mark.usefixtures("graph_kind")

SHAPES = {"few elements": (4, 8, 8, 8), "more than 2**18 elements": (8, 16, 64, 64)}


def input_gradient(forward, chunks, dys):
    inputs = [chunk.detach().clone().requires_grad_() for chunk in chunks]
    return torch.cat(torch.autograd.grad(list(forward(inputs)), inputs, list(dys))).double()


@pytest.mark.pairwise
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
@pytest.mark.parametrize("offset", [0.0, 10.0], ids=["dy of mean 0", "dy of mean 10"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_its_error_is_at_most_that_of_torchs_own_times_one_and_a_half(
    dtype, size, layout, offset, fused, run_replicas
):
    shape = SHAPES[size]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    dy = (torch.randn(shape) + offset).to(dtype).contiguous(memory_format=layout)
    layer, torchs = SynchronizedBatchNorm2d(shape[1], fused=fused), nn.BatchNorm2d(shape[1])
    exact = nn.BatchNorm2d(shape[1]).double()
    sizes = [shape[0] // 4, shape[0] - shape[0] // 4]

    ours = input_gradient(lambda inputs: run_replicas(layer, inputs), x.split(sizes), dy.split(sizes))
    theirs = input_gradient(lambda inputs: [torchs(*inputs)], [x], [dy])
    expected = input_gradient(lambda inputs: [exact(*inputs)], [x.double()], [dy.double()])
    assert (ours - expected).norm() <= 1.5 * (theirs - expected).norm()
