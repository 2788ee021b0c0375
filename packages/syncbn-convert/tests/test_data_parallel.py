"""An nn.DataParallel around the model, or inside of it, or around it later."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model, revert_model
from syncbn_core import SynchronizedBatchNorm1d
from syncbn_parallel import DataParallelWithCallback


def on_cpu(module: nn.Module, cls: type[nn.DataParallel] = nn.DataParallel, dim: int = 0) -> nn.DataParallel:
    """What nn.DataParallel's constructor makes for two devices of a GPU machine, with CPUs for them."""
    parallel = cls.__new__(cls)
    nn.Module.__init__(parallel)
    device = torch.device("cpu")
    parallel.module, parallel.device_ids, parallel.output_device = module, [device, device], device
    parallel.src_device_obj, parallel.dim = device, dim
    return parallel


class Foreign(nn.DataParallel):
    """A subclass with a replication of its own, which works on CPUs."""

    def replicate(self, module, device_ids):
        return [self._replica(module) for _ in device_ids]

    def _replica(self, module):
        replica = module._replicate_for_data_parallel()
        replica._parameters = dict(module._parameters)
        replica._buffers = {key: value.clone() for key, value in module._buffers.items()}
        return replica

    def scatter(self, inputs, kwargs, device_ids):
        return [(part,) for part in inputs[0].chunk(len(device_ids))], [{}] * len(device_ids)

    def parallel_apply(self, replicas, inputs, kwargs):
        with ThreadPoolExecutor(len(replicas)) as pool:
            futures = [pool.submit(replica, *own) for replica, own in zip(replicas, inputs)]
            return [future.result(timeout=30) for future in futures]

    def gather(self, outputs, output_device):
        return torch.cat(outputs)


def test_a_data_parallel_becomes_one_with_callbacks_and_the_same_devices():
    parallel = on_cpu(nn.BatchNorm1d(3))
    before = [parallel.device_ids, parallel.output_device, parallel.dim]

    assert convert_model(parallel) is parallel

    assert type(parallel) is DataParallelWithCallback
    assert [parallel.device_ids, parallel.output_device, parallel.dim] == before


def test_the_replicas_of_a_converted_data_parallel_normalize_as_one_batch():
    parallel = convert_model(on_cpu(nn.Sequential(nn.BatchNorm1d(3))))
    x = torch.randn(6, 3) * torch.arange(1.0, 7.0)[:, None]

    torch.testing.assert_close(parallel(x), nn.BatchNorm1d(3)(x))


def test_the_batch_dimension_is_carried_over():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x.T).T

    parallel = convert_model(on_cpu(Transposed(), dim=1))
    x = torch.randn(3, 6) * torch.arange(1.0, 7.0)

    torch.testing.assert_close(parallel(x), nn.BatchNorm1d(3)(x.T).T)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nn.DataParallel has device_ids where there is a GPU")
@pytest.mark.filterwarnings("ignore:DataParallelWithCallback found no GPU:UserWarning")
def test_a_data_parallel_without_devices_runs_the_converted_module_alone():
    with pytest.warns(UserWarning, match="found no GPU"):
        parallel = convert_model(nn.DataParallel(nn.BatchNorm1d(3)))
    x = torch.randn(6, 3)

    assert type(parallel) is DataParallelWithCallback
    assert type(parallel.module) is SynchronizedBatchNorm1d
    torch.testing.assert_close(parallel(x), nn.BatchNorm1d(3)(x), rtol=0, atol=0)


def test_a_subclass_keeps_its_class_and_its_replicas_normalize_as_one_batch():
    parallel = convert_model(on_cpu(nn.BatchNorm1d(3), Foreign))
    x = torch.randn(6, 3) * torch.arange(1.0, 7.0)[:, None]

    assert type(parallel) is Foreign
    torch.testing.assert_close(parallel(x), nn.BatchNorm1d(3)(x))


def test_a_subclass_calls_replication_callbacks_from_then_on():
    class Counting(nn.Linear):
        def __data_parallel_replicate__(self, ctx, copy_id):
            called.append((copy_id, ctx.num_replicas))

    called: list[tuple[int, int]] = []
    parallel = convert_model(on_cpu(Counting(3, 3), Foreign))

    parallel(torch.randn(6, 3))

    assert called == [(0, 2), (1, 2)]


@pytest.mark.parametrize("cls", [nn.DataParallel, Foreign, DataParallelWithCallback])
@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(m)])
def test_a_reverted_wrapper_equals_the_original(cls, around, snapshot):
    model = around(on_cpu(nn.Sequential(nn.BatchNorm1d(3)), cls))
    before = snapshot(model)

    convert_model(convert_model(model))
    assert snapshot(model) != before
    revert_model(model)

    assert snapshot(model) == before


def test_a_wrapper_put_around_the_converted_model_normalizes_as_one_batch():
    parallel = DataParallelWithCallback(convert_model(nn.Sequential(nn.BatchNorm1d(3))), ["cpu"] * 3)
    x = torch.randn(7, 3) * torch.arange(1.0, 8.0)[:, None]

    torch.testing.assert_close(parallel(x), nn.BatchNorm1d(3)(x))


def test_a_wrapper_that_is_skipped_stays_with_all_that_it_contains(snapshot):
    model = nn.Sequential(on_cpu(nn.BatchNorm1d(3)))
    before = snapshot(model)

    convert_model(model, skip="0")

    assert snapshot(model) == before


def test_hooks_and_attributes_of_the_wrapper_are_kept():
    calls = []
    parallel = on_cpu(nn.BatchNorm1d(3)).eval()
    parallel.note = "mine"
    parallel.register_forward_hook(lambda *args: calls.append("hook"))

    convert_model(parallel)
    parallel(torch.randn(4, 3))

    assert (calls, parallel.note, parallel.training) == (["hook"], "mine", False)


def test_gradients_and_running_statistics_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.SyncBatchNorm(4)).double()
    model = copy.deepcopy(whole)
    x, weights = torch.randn(7, 2, 6, 6).double(), torch.randn(7, 4, 4, 4).double()
    (whole(x) * weights).sum().backward()

    parallel = DataParallelWithCallback(convert_model(model), ["cpu"] * 3)
    (parallel(x) * weights).sum().backward()

    for ours, reference in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-12, atol=1e-12)
    for ours, reference in zip(model.buffers(), whole.buffers()):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
