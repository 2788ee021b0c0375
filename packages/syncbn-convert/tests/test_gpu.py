"""An nn.DataParallel on GPUs, converted."""

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model, revert_model
from syncbn_parallel import DataParallelWithCallback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.mark.parametrize("moved_first", [True, False])
def test_a_converted_data_parallel_normalizes_as_one_batch(moved_first):
    count = torch.cuda.device_count()
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    parallel = nn.DataParallel(
        model.cuda() if moved_first else model, list(range(count)) if count > 1 else [0, 0]
    )
    before = dict(vars(parallel))
    x = torch.randn(7, 3).double() * torch.arange(1.0, 8.0)[:, None]

    convert_model(parallel)
    output = parallel.cuda()(x.cuda())

    assert type(parallel) is DataParallelWithCallback
    torch.testing.assert_close(output.cpu(), nn.BatchNorm1d(3).double()(x), rtol=1e-12, atol=1e-12)
    assert vars(revert_model(parallel)) == before
