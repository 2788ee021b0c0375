"""On GPUs, all that there are, or two replicas on one: as on the CPU."""

import copy

import pytest
import torch
from torch import nn

from gpus import recorded
from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def gpus():
    """All GPUs; the one twice where there is only one."""
    count = torch.cuda.device_count()
    return list(range(count)) if count > 1 else [0, 0]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_residual_net_on_gpus_equals_the_whole_batch(channels_last, residual_net, train_step, assert_close):
    whole = residual_net().cuda()
    replicas = DataParallelWithCallback(convert_model(copy.deepcopy(whole)), gpus())
    x = torch.randn(3 * len(gpus()) + 1, 3, 6, 6, dtype=torch.float64, device="cuda")
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        assert_close(train_step(replicas, x), train_step(whole, x), rtol=1e-9, atol=1e-9)


def test_a_stock_data_parallel_on_gpus_equals_the_whole_batch(residual_net, train_step, assert_close):
    if torch.cuda.device_count() < 2:
        pytest.skip("a stock nn.DataParallel puts no two replicas on one GPU")
    whole = residual_net().cuda()
    replicas = nn.DataParallel(convert_model(copy.deepcopy(whole)))
    x = torch.randn(3 * len(gpus()), 3, 6, 6, dtype=torch.float64, device="cuda")
    assert_close(train_step(replicas, x), train_step(whole, x), rtol=1e-9, atol=1e-9)


def test_a_replica_that_fails_on_a_gpu_is_named_and_the_next_step_is_right(residual_net):
    replicas = DataParallelWithCallback(convert_model(residual_net()).cuda(), gpus())
    x = torch.randn(2 * len(gpus()) + 1, 3, 6, 6, dtype=torch.float64, device="cuda")
    smallest = min(len(part) for part in x.chunk(len(gpus())))

    def fail_in_smallest(_, args):
        if len(args[0]) == smallest:
            raise torch.cuda.OutOfMemoryError("no memory left")

    handle = replicas.module[8].register_forward_pre_hook(fail_in_smallest)
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        replicas(x)
    assert "on cuda:" in "".join(caught.value.__notes__)
    handle.remove()
    torch.testing.assert_close(replicas(x), residual_net().cuda()(x), rtol=1e-9, atol=1e-9)


def test_a_cuda_graph_of_replicas_gives_the_same_as_a_step():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)]
    whole = nn.Sequential(*layers).to("cuda", torch.float64)
    replicas = DataParallelWithCallback(convert_model(copy.deepcopy(whole)), [0, 0])
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, device="cuda")
    dy = torch.randn(6, 4, 4, 4, dtype=torch.float64, device="cuda")

    def step():
        y = replicas(x)
        y.backward(dy)
        return y

    graph, y = recorded(step, replicas.parameters())
    replicas.module.load_state_dict(whole.state_dict())
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        whole.zero_grad()
        expected = whole(x)
        expected.backward(dy)
        ours = [y, *(p.grad for p in replicas.parameters()), *replicas.buffers()]
        theirs = [expected, *(p.grad for p in whole.parameters()), *whole.buffers()]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
