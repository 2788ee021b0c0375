"""The same on GPUs; with one GPU, two replicas share it."""

import copy

import pytest
import torch
from torch import nn

from gpus import no_wait
from syncbn_parallel import DataParallelWithCallback, patch_replication_callback, replicate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

COUNT = torch.cuda.device_count()
PLACES = [[0, 0], [0, 0, 0], *([[0, 1], [0, 1, 0], list(range(COUNT))] if COUNT > 1 else [])]


@pytest.mark.parametrize("device_ids", PLACES)
@pytest.mark.parametrize("batch", [8, 5, 1])
def test_output_and_gradients_are_those_of_the_whole_batch(centred_net, device_ids, batch):
    net = centred_net().cuda()
    model = DataParallelWithCallback(copy.deepcopy(net), device_ids)
    x = torch.randn(batch, 4).double()
    weights = torch.randn(batch, 4).double().cuda()
    ours, theirs = x.clone().requires_grad_(), x.cuda().requires_grad_()
    (model(ours) * weights).sum().backward()
    (net(theirs) * weights).sum().backward()
    torch.testing.assert_close(ours.grad.cuda(), theirs.grad, rtol=0, atol=1e-12)
    for one, other in zip(model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:expected batch-norm layers that synchronize:UserWarning")
@pytest.mark.parametrize("device_ids", PLACES)
def test_only_the_first_replica_updates_the_buffers_of_the_module(device_ids):
    module = nn.BatchNorm1d(2).cuda()
    model = DataParallelWithCallback(module, device_ids)
    model(torch.ones(4 * len(device_ids), 2))
    assert module.num_batches_tracked.item() == 1
    replicas = replicate(module, device_ids)
    assert replicas[0].running_mean is module.running_mean
    assert len({r.running_mean.data_ptr() for r in replicas}) == len(replicas)


def test_replicas_work_on_the_callers_stream_and_under_its_autocast():
    class Probe(nn.Module):
        def forward(self, x):
            return (x @ x.T).dtype, torch.cuda.current_stream(x.device), x.device

    model = DataParallelWithCallback(Probe(), [0, 0])
    with torch.cuda.stream(torch.cuda.Stream()) as _, torch.autocast("cuda", dtype=torch.bfloat16):
        dtype, stream, device = model(torch.ones(4, 4))
        assert stream == torch.cuda.current_stream()
    assert dtype == torch.bfloat16
    assert device == torch.device("cuda", 0)


def test_scattering_replicating_and_gathering_never_wait_for_the_gpu(centred_net):
    model = DataParallelWithCallback(centred_net().cuda(), [0, 0])
    x = torch.randn(4, 4).double().cuda()
    model(x)
    with no_wait():
        model(x).sum().backward()


def test_a_patched_stock_data_parallel_synchronizes(centred_net):
    if COUNT < 2:
        pytest.skip("torch's own nn.DataParallel wants two different devices")
    net = centred_net().cuda()
    x = torch.randn(6, 4).double().cuda()
    model = patch_replication_callback(nn.DataParallel(net))
    torch.testing.assert_close(model(x), net(x), rtol=0, atol=1e-12)


def test_a_failure_on_the_gpu_is_the_original_one(centred_net):
    class Greedy(nn.Module):
        def forward(self, x):
            return x if x[0, 0] == 0 else torch.empty(1 << 60, device=x.device)

    model = DataParallelWithCallback(nn.Sequential(Greedy(), centred_net()).cuda(), [0, 0])
    x = torch.zeros(4, 4).double()
    x[2:] = 1
    with pytest.raises(RuntimeError, match=r"out of memory|storage") as caught:
        model(x)
    assert caught.value.__notes__ == ["raised in replica 1 (of 0 to 1) on cuda:0, in layer '0' (Greedy)"]
    assert model(x * 0).shape == (4, 4)


def test_all_gpus_are_used_if_none_is_named():
    model = DataParallelWithCallback(nn.Linear(4, 2).cuda())
    assert list(model.device_ids) == list(range(COUNT))
    assert model(torch.ones(2 * COUNT, 4)).shape == (2 * COUNT, 2)


def test_a_mix_of_cpu_and_gpu_is_refused():
    with pytest.raises(ValueError, match="of one kind"):
        DataParallelWithCallback(nn.Linear(4, 2), ["cpu", 0])


def test_the_output_can_go_to_the_cpu():
    model = DataParallelWithCallback(nn.Linear(4, 2).cuda(), [0, 0], output_device=-1)
    assert model(torch.ones(4, 4)).device.type == "cpu"
