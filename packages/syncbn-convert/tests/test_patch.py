"""Synchronized layers in code that somebody else wrote."""

import asyncio
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import BatchNorm2d as name_imported_before
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_convert import patch_sync_batchnorm, register_conversion, revert_model
from syncbn_core import (
    THIS_PROCESS,
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)


class Odd(nn.BatchNorm2d):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()


class SynchronizedOdd(Odd, SynchronizedBatchNorm2d):
    pass


@pytest.fixture(autouse=True)
def _torch_is_as_it_was():
    before = [(cls, dict(vars(cls))) for cls in (*_BatchNorm.__mro__, nn.BatchNorm2d, nn.SyncBatchNorm)]
    yield
    for cls, attributes in before:
        assert dict(vars(cls)) == attributes


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: nn.BatchNorm1d(3), SynchronizedBatchNorm1d),
        (lambda: nn.BatchNorm2d(3), SynchronizedBatchNorm2d),
        (lambda: nn.BatchNorm3d(3), SynchronizedBatchNorm3d),
        (lambda: nn.SyncBatchNorm(3), SynchronizedBatchNorm),
        (lambda: name_imported_before(3), SynchronizedBatchNorm2d),
        (lambda: nn.InstanceNorm2d(3), nn.InstanceNorm2d),
        (lambda: SynchronizedBatchNorm2d(3), SynchronizedBatchNorm2d),
    ],
)
def test_layers_built_inside_are_synchronized_and_those_built_after_are_not(build, expected):
    with patch_sync_batchnorm():
        inside = build()

    assert type(inside) is expected
    assert type(nn.BatchNorm2d(3)) is nn.BatchNorm2d


def test_the_arguments_of_the_constructor_hold():
    with patch_sync_batchnorm():
        layer = nn.BatchNorm2d(3, 1e-3, momentum=None, affine=False, device="meta", dtype=torch.float64)

    assert (layer.num_features, layer.eps, layer.momentum, layer.weight) == (3, 1e-3, None, None)
    assert (layer.running_mean.device.type, layer.running_mean.dtype) == ("meta", torch.float64)


def test_the_options_hold_as_in_convert_model():
    with patch_sync_batchnorm(process_group=THIS_PROCESS, eps_mode="clamp", fused=False):
        layers = [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.SyncBatchNorm(3, process_group=object())]

    assert [layer.process_group for layer in layers] == [THIS_PROCESS] * 3
    assert all((layer.eps_mode, layer.fused) == ("clamp", False) for layer in layers)


def test_the_layers_can_be_reverted():
    with patch_sync_batchnorm(fused=False):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))

    revert_model(model)

    assert [type(layer) for layer in model] == [nn.BatchNorm2d, nn.SyncBatchNorm]
    assert [list(vars(layer)) for layer in model] == [list(vars(layer)) for layer in plain]


def test_the_layers_can_be_pickled():
    with patch_sync_batchnorm():
        layer = nn.BatchNorm2d(3)

    assert type(pickle.loads(pickle.dumps(layer))) is SynchronizedBatchNorm2d


def test_blocks_can_be_nested_and_the_innermost_options_hold():
    with patch_sync_batchnorm(eps_mode="clamp"):
        with patch_sync_batchnorm(eps_mode="plus"):
            inner = nn.BatchNorm2d(3)
        outer = nn.BatchNorm2d(3)

    assert (inner.eps_mode, outer.eps_mode) == ("plus", "clamp")


def test_torch_is_restored_after_an_exception():
    with pytest.raises(KeyError), patch_sync_batchnorm():
        raise KeyError

    assert type(nn.BatchNorm2d(3)) is nn.BatchNorm2d


def test_it_decorates_a_function_that_builds():
    @patch_sync_batchnorm()
    def build() -> nn.Module:
        return nn.BatchNorm2d(3)

    assert type(build()) is type(build()) is SynchronizedBatchNorm2d


def in_a_thread(function) -> object:
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
    return results[0]


def test_what_another_thread_builds_in_the_meantime_is_not_affected():
    with patch_sync_batchnorm():
        assert type(in_a_thread(lambda: nn.BatchNorm2d(3))) is nn.BatchNorm2d
        assert type(nn.BatchNorm2d(3)) is SynchronizedBatchNorm2d


def test_blocks_of_two_threads_may_end_in_any_order():
    def block() -> type:
        with patch_sync_batchnorm():
            entered.set()
            assert left.wait(timeout=10)
            return type(nn.BatchNorm2d(3))

    entered, left, results = threading.Event(), threading.Event(), []
    thread = threading.Thread(target=lambda: results.append(block()), daemon=True)
    with patch_sync_batchnorm():
        thread.start()
        assert entered.wait(timeout=10)
    assert type(nn.BatchNorm2d(3)) is nn.BatchNorm2d
    left.set()
    thread.join(timeout=10)

    assert not thread.is_alive()
    assert results == [SynchronizedBatchNorm2d]


def test_what_another_task_builds_in_the_meantime_is_not_affected():
    async def main() -> tuple[type, type]:
        async def other() -> type:
            await entered.wait()
            try:
                return type(nn.BatchNorm2d(3))
            finally:
                built.set()

        entered, built = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(other())
        with patch_sync_batchnorm():
            entered.set()
            await built.wait()
            mine = type(nn.BatchNorm2d(3))
        return await task, mine

    assert asyncio.run(main()) == (nn.BatchNorm2d, SynchronizedBatchNorm2d)


def test_one_warning_at_the_line_of_the_block_lists_the_other_classes():
    def build() -> None:
        Odd(3)
        Odd(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own: lazy modules are new
            nn.LazyBatchNorm1d()

    with pytest.warns(UserWarning, match="do not synchronize") as caught, patch_sync_batchnorm():
        build()

    (warning,) = caught
    assert "LazyBatchNorm1d" in str(warning.message)
    assert str(warning.message).count("Odd") == 1
    assert warning.filename == __file__


def test_a_subclass_with_a_registered_conversion_is_synchronized():
    with register_conversion(Odd, SynchronizedOdd), patch_sync_batchnorm(fused=False):
        layer = Odd(3)

    assert type(layer) is SynchronizedOdd
    assert layer.fused is False
    assert isinstance(layer.act, nn.ReLU)


def test_an_unknown_option_is_an_error_at_the_block_and_changes_nothing():
    with pytest.raises(ValueError, match="eps_mode"), patch_sync_batchnorm(eps_mode="minus"):
        pass
