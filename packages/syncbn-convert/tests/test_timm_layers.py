"""timm's layers with an activation convert. They are recognized by name: these are stand-ins of that name."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn_convert import convert_model, inspect_model, patch_sync_batchnorm, revert_model
from syncbn_core import SynchronizedBatchNorm, SynchronizedBatchNorm2d
from syncbn_parallel import DataParallelWithCallback


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: normalizes by itself, then applies drop and act."""

    def __init__(self, num_features, apply_act=True, act_layer=nn.SiLU, device=None, dtype=None):
        super().__init__(num_features, device=device, dtype=dtype)
        self.drop = nn.Identity()
        self.act = act_layer() if apply_act else nn.Identity()

    def forward(self, x):
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's: the attributes are given to it after it is built."""

    def forward(self, x):
        x = super().forward(x)
        if hasattr(self, "drop"):
            x = self.drop(x)
        if hasattr(self, "act"):
            x = self.act(x)
        return x


@pytest.fixture(autouse=True, params=["timm.layers.norm_act", "timm.models.layers.norm_act"])
def module(request, monkeypatch):
    """Make this file's classes the members of a module of that name, with the packages around it."""
    parts = request.param.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        stand_in = types.ModuleType(name)
        stand_in.__path__ = []
        monkeypatch.setitem(sys.modules, name, stand_in)
    if request.param.startswith("timm.models"):
        monkeypatch.setitem(sys.modules, "timm.layers.norm_act", None)  # an older timm
    for cls in (BatchNormAct2d, SyncBatchNormAct):
        monkeypatch.setattr(cls, "__module__", request.param)
        setattr(stand_in, cls.__name__, cls)
    return stand_in


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    ).double()


def test_a_layer_converts_in_place_and_synchronizes_and_reverts(snapshot):
    model, whole = make_model(), make_model()
    layer = model[1]
    before = snapshot(model)
    convert_model(model, eps_mode="plus")

    assert model[1] is layer
    assert isinstance(layer, BatchNormAct2d)
    assert isinstance(layer, SynchronizedBatchNorm2d)
    assert type(layer).__name__ == "SynchronizedBatchNormAct2d"
    assert str(inspect_model(model)).endswith("2 synchronize, 0 do not")

    x = torch.randn(7, 3, 6, 6, dtype=torch.float64)
    x[0] += 5
    weights = torch.linspace(-1, 2, 7 * 4 * 4 * 4, dtype=torch.float64).view(7, 4, 4, 4)
    (DataParallelWithCallback(model, ["cpu"] * 3)(x) * weights).sum().backward()
    (whole(x) * weights).sum().backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    for (name, ours), theirs in zip(model.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)

    reverted = revert_model(model)
    assert type(layer) is BatchNormAct2d
    assert [entry[:3] for entry in snapshot(reverted)] == [entry[:3] for entry in before]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(reverted.eval()(x), whole.eval()(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps_mode", ["plus", "clamp"])
def test_alone_it_activates_once(training, eps_mode):
    layer = convert_model(nn.Sequential(BatchNormAct2d(3)), eps_mode=eps_mode).train(training)
    plain = nn.BatchNorm2d(3, eps=1e-5).train(training)
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(layer(x), F.silu(plain(x)), rtol=1e-4, atol=1e-4)


def test_its_drop_and_its_activation_are_the_layers_own():
    layer = BatchNormAct2d(3, act_layer=nn.Tanh)
    layer.drop = nn.Dropout(1.0)
    drop, act = layer.drop, layer.act
    convert_model(layer)
    assert (layer.drop, layer.act) == (drop, act)
    assert torch.equal(layer(torch.randn(4, 3, 2, 2)), torch.zeros(4, 3, 2, 2))


def test_a_layer_without_an_activation_converts():
    layer = convert_model(BatchNormAct2d(3, apply_act=False))
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_converted_layer_can_be_copied_and_pickled_and_the_copy_reverted(copied):
    model = copied(convert_model(make_model()))
    assert isinstance(model[1], BatchNormAct2d)
    assert isinstance(model[1], SynchronizedBatchNorm2d)
    assert type(revert_model(model)[1]) is BatchNormAct2d


def test_a_pickle_names_the_package_and_not_one_of_its_files():
    pickled = pickle.dumps(convert_model(BatchNormAct2d(3)), protocol=0)
    assert b"csyncbn_convert\nSynchronizedBatchNormAct2d\n" in pickled


def test_the_class_is_made_once():
    assert type(convert_model(BatchNormAct2d(3))) is type(convert_model(BatchNormAct2d(5)))


def test_a_layer_built_inside_the_patch_is_synchronized_and_complete():
    with patch_sync_batchnorm():
        layer = BatchNormAct2d(3)
    assert type(layer).__name__ == "SynchronizedBatchNormAct2d"
    assert isinstance(layer.act, nn.SiLU)
    assert type(revert_model(layer)) is BatchNormAct2d


def test_a_subclass_is_left_alone_with_a_warning():
    class Mine(BatchNormAct2d):
        pass

    with pytest.warns(UserWarning, match="Mine is a subclass of BatchNorm2d"):
        convert_model(nn.Sequential(Mine(3)))


def test_torchs_synchronized_layer_with_an_activation_converts(snapshot):
    layer = SyncBatchNormAct(3)
    layer.act, layer.drop = nn.SiLU(), nn.Identity()
    model = nn.Sequential(layer)
    before = snapshot(model)
    convert_model(model)
    assert isinstance(layer, SynchronizedBatchNorm)
    x = torch.randn(4, 3, 2, 2)
    y = DataParallelWithCallback(model, ["cpu"] * 2)(x)
    torch.testing.assert_close(y, F.silu(nn.BatchNorm2d(3)(x)))
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(layer)
    assert type(revert_model(model)[0]) is SyncBatchNormAct
    assert [entry[:3] for entry in snapshot(model)] == [entry[:3] for entry in before]


def test_a_class_of_that_name_in_another_module_is_not_meant(monkeypatch):
    monkeypatch.setattr(BatchNormAct2d, "__module__", "mine.norm_act")
    with pytest.warns(UserWarning, match="BatchNormAct2d is a subclass of BatchNorm2d"):
        convert_model(nn.Sequential(BatchNormAct2d(3)))
