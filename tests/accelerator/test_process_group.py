"""The process group between devices: collectives on streams of their own, counted, and all that DDP needs."""

import os
import runpy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import simulated_accelerator

_core = Path(__file__).parents[2] / "packages" / "syncbn-core" / "tests" / "distributed"
Processes = runpy.run_path(str(_core / "processes.py"))["Processes"]


@pytest.fixture(scope="module")
def processes(accelerator):
    """Two processes that can import the accelerator."""
    folder = str(Path(accelerator.__file__).parents[1])
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    workers = Processes(2, environment={"PYTHONPATH": path})
    yield workers
    workers.end()


_groups = []


def group_of_devices():
    simulated_accelerator.load()
    if not _groups:
        _groups.append(dist.new_group(backend=simulated_accelerator.BACKEND))
    return _groups[0]


def collectives(world):
    group, device = group_of_devices(), f"sim:{world.rank}"
    own = torch.full((3,), world.rank + 1.0, device=device)
    with simulated_accelerator.counted() as counts:
        everybody = own.new_empty(2, 3)
        dist.all_gather_single(everybody, own, group=group)
        rows = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(rows, own, group=group)
        total, first, integers = own.clone(), own.clone(), own.int()
        dist.all_reduce(total, group=group)
        dist.all_reduce(integers, group=group)
        dist.all_reduce(own.double(), group=group)
        dist.broadcast(first, 0, group=group)
        dist.barrier(group=group)
    results = [everybody.tolist(), [row.tolist() for row in rows], total.tolist(), first.tolist()]
    return results, integers.tolist(), dict(counts)


def test_collectives_are_right_and_counted(processes):
    everybody = [[1.0] * 3, [2.0] * 3]
    for results, integers, counts in processes.run(collectives):
        assert results == [everybody, everybody, [3.0] * 3, [1.0] * 3]
        assert integers == [3, 3, 3]
        assert counts == {
            "all_gather into a tensor": 1,
            "all_gather of a list": 1,
            "all_reduce": 3,
            "broadcast": 1,
            "copy on the device": 4,
        }


def a_collective_that_nobody_waits_for(world):
    own = torch.ones(3, device=f"sim:{world.rank}")
    work = dist.all_reduce(own, group=group_of_devices(), async_op=True)
    with pytest.raises(RuntimeError, match="got a race: add"):
        own + 1
    work.wait()
    return (own + 1).tolist()


def test_the_result_of_a_collective_has_to_be_waited_for(processes):
    assert processes.run(a_collective_that_nobody_waits_for) == [[3.0] * 3] * 2


def tensors_that_do_not_fit(world):
    group = group_of_devices()
    with pytest.raises(RuntimeError, match="same device"):
        dist.all_gather_single(torch.empty(6, device="sim:0"), torch.ones(3, device="sim:1"), group=group)
    with pytest.raises(RuntimeError, match="contiguous"):
        dist.all_reduce(torch.ones(3, 2, device="sim:0").t(), group=group)


def test_tensors_of_several_devices_or_with_gaps_are_refused(processes):
    processes.run(tensors_that_do_not_fit)


def objects_and_sub_groups(world):
    group_of_devices()
    subgroup = dist.new_group([0, 1], backend=simulated_accelerator.BACKEND)
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": world.rank}, group=subgroup)
    alone = [dist.new_group([rank], backend=simulated_accelerator.BACKEND) for rank in range(2)]
    own = torch.full((1,), float(world.rank), device="sim:2")
    dist.all_reduce(own, group=alone[world.rank])
    return objects, own.tolist()


def test_sub_groups_and_objects_work(processes):
    objects = [{"rank": 0}, {"rank": 1}]
    assert processes.run(objects_and_sub_groups) == [(objects, [0.0]), (objects, [1.0])]


def a_collective_that_one_process_leaves_out(world):
    group_of_devices()
    group = dist.new_group(backend=simulated_accelerator.BACKEND, timeout=timedelta(seconds=1))
    if world.rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            dist.all_reduce(torch.ones(3, device="sim:0"), group=group)
    dist.barrier()  # of gloo: process 1 stays until then


def test_a_process_that_does_not_arrive_is_a_runtime_error_after_the_timeout(processes):
    processes.run(a_collective_that_one_process_leaves_out)


def train_in_ddp(world):
    group, device = group_of_devices(), f"sim:{world.rank}"
    layers = [nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4, process_group=group), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    model = nn.Sequential(*layers).double()
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    twin.load_state_dict(model.state_dict())
    ddp = DistributedDataParallel(model.to(device), device_ids=[world.rank], process_group=group)
    whole, weights = torch.randn(5, 3, 4, 4).double(), torch.randn(5, 2, 2, 2).double()
    x, dy = (world.share(each, [2, 3]).to(device) for each in (whole, weights))
    (ddp(x) * dy).sum().backward()
    (twin(whole) * weights).sum().backward()
    for own, expected in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(own.grad.cpu() * 2, expected.grad)  # DDP's is the average
    torch.testing.assert_close(model[1].running_var.cpu(), twin[1].running_var)


def test_ddp_trains_torchs_own_layer_as_the_whole_batch(processes):
    processes.run(train_in_ddp)


def costs_of_torchs_own_layer(world):
    group, device = group_of_devices(), f"sim:{world.rank}"
    layer = nn.SyncBatchNorm(4, process_group=group).to(device)
    x = torch.randn(2, 4, 3, 5, device=device).requires_grad_()
    with simulated_accelerator.counted() as forward:
        y = layer(x)
    dy = torch.randn_like(y)
    with simulated_accelerator.counted() as backward:
        y.backward(dy)
    return [(counts.total, counts.reads) for counts in (forward, backward)]


def test_torchs_own_layer_costs_15_launches_and_4_and_reads_3_times(processes):
    assert processes.run(costs_of_torchs_own_layer) == [[(15, 3), (4, 0)]] * 2
