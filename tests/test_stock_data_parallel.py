"""A stock nn.DataParallel synchronizes too, with and without the patch."""

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncbn_comm import SyncError
from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback, patch_replication_callback

EXACT = {"rtol": 1e-12, "atol": 1e-12}
JOIN_SECONDS = 60


@pytest.fixture(autouse=True)
def _torch_replicates_on_the_cpu(monkeypatch):
    """Keep torch's own replicate, except for the copies to other devices."""

    def copy_to_devices(tensors, devices, detach=False):
        if detach:
            return [tensors, *([tensor.clone() for tensor in tensors] for _ in devices[1:])]
        return [[tensor.view_as(tensor) for tensor in tensors] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copy_to_devices)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)


class StockOnCpu(nn.DataParallel):
    """Does on the CPU what a stock nn.DataParallel does on GPUs: replicate, then a thread per replica."""

    def __init__(self, module: nn.Module, replicas: int = 2) -> None:
        super().__init__(module)
        self.device_ids = list(range(replicas))
        self.output_device = 0
        self.dim = 0

    def forward(self, x: Tensor) -> Tensor:
        chunks = [(chunk,) for chunk in x.chunk(len(self.device_ids))]
        if len(chunks) == 1:
            return self.module(*chunks[0])
        replicas = self.replicate(self.module, self.device_ids[: len(chunks)])
        return torch.cat(self.parallel_apply(replicas, chunks, [{}] * len(chunks)))

    def parallel_apply(self, replicas: Any, inputs: Any, kwargs: Any) -> list[Any]:
        outcomes: list[Any] = [None] * len(replicas)
        grad_enabled = torch.is_grad_enabled()

        def run(rank: int) -> None:
            try:
                with torch.set_grad_enabled(grad_enabled):
                    outcomes[rank] = replicas[rank](*inputs[rank], **kwargs[rank])
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_SECONDS)
        assert not any(thread.is_alive() for thread in threads)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes


def without_a_word(model: nn.DataParallel) -> nn.DataParallel:
    return model


@pytest.mark.parametrize("prepare", [without_a_word, patch_replication_callback])
@pytest.mark.parametrize("replicas", [2, 3])
def test_it_equals_the_whole_batch_step_after_step(prepare, replicas, residual_net, train_step, assert_close):
    model = StockOnCpu(convert_model(residual_net()), replicas)
    prepare(model)
    whole = residual_net()
    for samples in (6, 5, 4, 1 + replicas):  # a last batch may be smaller
        x = torch.randn(samples, 3, 6, 6, dtype=torch.float64)
        assert_close(train_step(model, x), train_step(whole, x), **EXACT)


def test_without_conversion_it_differs(residual_net, train_step):
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    difference = train_step(StockOnCpu(residual_net()), x)["y"] - train_step(residual_net(), x)["y"]
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("prepare", [without_a_word, patch_replication_callback])
def test_a_forward_without_gradients_and_one_in_eval_mode_work(prepare, residual_net):
    model, whole = StockOnCpu(convert_model(residual_net())), residual_net()
    prepare(model)
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole(x), **EXACT)
    torch.testing.assert_close(model.eval()(x), whole.eval()(x), **EXACT)


class SkipsOnePlace(nn.Module):
    """Replicas with a negative input do not reach the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(2)
        self.second = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y if x.amax() < 0 else self.second(y)


@pytest.mark.parametrize("prepare", [without_a_word, patch_replication_callback])
def test_a_replica_that_skips_a_layer_is_an_error_and_the_next_forward_works(prepare):
    model = StockOnCpu(convert_model(SkipsOnePlace()))
    prepare(model)
    good = torch.rand(4, 2)
    bad = torch.cat([good[:2], -good[2:]])
    with pytest.raises(SyncError, match=r"replica 1 .*'second'"):
        model(bad)
    torch.testing.assert_close(model(good), SkipsOnePlace()(good))


@pytest.mark.filterwarnings("ignore:DataParallelWithCallback found no GPU:UserWarning")
@pytest.mark.parametrize("wrapper", [nn.DataParallel, DataParallelWithCallback])
def test_converting_before_and_after_wrapping_give_one_result_without_a_gpu(wrapper, residual_net):
    if nn.DataParallel(nn.Identity()).device_ids:
        pytest.skip("uses all devices of this machine's accelerator")
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    expected = residual_net()(x)
    for model in (convert_model(wrapper(residual_net())), wrapper(convert_model(residual_net()))):
        assert isinstance(model, nn.DataParallel)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
