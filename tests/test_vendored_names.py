"""The names and keywords of a vendored `sync_batchnorm` folder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncbn_core
from syncbn_comm import FutureResult, SlavePipe, SyncMaster
from syncbn_convert import convert_model, patch_sync_batchnorm
from syncbn_core import BatchNorm2dReimpl, SynchronizedBatchNorm2d, set_sbn_eps_mode
from syncbn_parallel import (
    CallbackContext,
    DataParallelWithCallback,
    execute_replication_callbacks,
    patch_replication_callback,
)


def test_the_names_exist():
    for name in (FutureResult, SlavePipe, BatchNorm2dReimpl, CallbackContext, patch_sync_batchnorm):
        assert name.__doc__
    for name in (execute_replication_callbacks, patch_replication_callback, set_sbn_eps_mode):
        assert callable(name)


def test_the_keywords_of_the_master_work():
    master = SyncMaster(master_callback=lambda messages: messages)
    assert master.run_master(master_msg="message") == "message"
    assert isinstance(master.register_slave(identifier=1), SlavePipe)
    assert master.nr_slaves == 1


def test_the_keyword_of_the_converter_works():
    layer = nn.BatchNorm2d(3)
    assert convert_model(module=layer) is layer
    assert isinstance(layer, SynchronizedBatchNorm2d)


def test_the_base_class_can_be_imported_and_subclassed():
    class Mine(syncbn_core._SynchronizedBatchNorm):
        def _check_input_dim(self, input):
            assert input.dim() == 3

    x = torch.randn(6, 4, 2, dtype=torch.float64)
    y = DataParallelWithCallback(Mine(4).double(), ["cpu"] * 3)(x)
    torch.testing.assert_close(y, nn.BatchNorm1d(4).double()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer", ["SynchronizedBatchNorm1d", "SynchronizedBatchNorm2d", "SynchronizedBatchNorm3d"]
)
def test_the_positional_arguments_are_those_of_the_folder(layer):
    built = getattr(syncbn_core, layer)(3, 1e-3, 0.001, False)
    assert (built.num_features, built.eps, built.momentum, built.affine) == (3, 1e-3, 0.001, False)
