"""The layers have the arguments of torch's own, by position and by keyword, and name their public package."""

import inspect
import pickle

import pytest
import torch
from torch import nn

import syncbn_core
from syncbn_core import SynchronizedBatchNorm2d, _SynchronizedBatchNorm

LAYERS = [getattr(syncbn_core, name) for name in syncbn_core.__all__ if name.startswith("Sync")]


class Group:
    """Stands for a process group."""


@pytest.mark.parametrize("kind", LAYERS)
def test_the_positional_arguments_are_torchs(kind):
    ours = list(inspect.signature(kind).parameters)
    assert ours[:7] == list(inspect.signature(nn.BatchNorm2d).parameters)[:7]
    assert ours[7:] == ["process_group", "eps_mode", "fused", "bias"]


@pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=repr)
def test_the_sixth_argument_is_the_device_and_the_seventh_the_dtype(device):
    layer = SynchronizedBatchNorm2d(8, 1e-5, 0.1, True, True, device, torch.float64)
    assert layer.weight.device.type == layer.running_var.device.type == "meta"
    assert layer.weight.dtype == torch.float64
    assert layer.process_group is None


def test_a_process_group_in_the_place_of_the_device_is_taken_as_one():
    group = Group()
    layer = SynchronizedBatchNorm2d(8, 1e-5, 0.1, True, True, group)
    assert layer.process_group is group
    assert layer.weight.device.type == "cpu"


@pytest.mark.parametrize("name", [*syncbn_core.__all__, "_SynchronizedBatchNorm"])
def test_classes_name_the_public_package(name):
    value = getattr(syncbn_core, name)
    if isinstance(value, type):
        assert value.__module__ == "syncbn_core"
        assert pickle.loads(pickle.dumps(value)) is value


def test_the_common_base_can_be_imported_and_subclassed_under_its_old_name(assert_equals_whole_batch):
    class SynchronizedBatchNorm4d(_SynchronizedBatchNorm):
        def _check_input_dim(self, input):
            if input.dim() != 4:
                raise ValueError(f"expected 4D input, got {input.dim()}D")

    assert all(issubclass(kind, _SynchronizedBatchNorm) for kind in LAYERS)
    layer = SynchronizedBatchNorm4d(4, dtype=torch.float64)
    chunks = [torch.randn(size, 4, 2, 2, dtype=torch.float64) for size in (2, 1)]
    assert_equals_whole_batch(layer, chunks, rtol=1e-10, atol=1e-10)
