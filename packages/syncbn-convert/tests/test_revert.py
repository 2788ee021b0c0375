"""The way back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from syncbn_convert import convert_model, revert_model
from syncbn_core import SynchronizedBatchNorm2d


def make_model() -> nn.Module:
    shared = nn.BatchNorm2d(3)
    process_wide = nn.SyncBatchNorm(3)
    shared.note = process_wide.note = object()
    return nn.Sequential(shared, process_wide, nn.ModuleList([shared]), nn.BatchNorm3d(3, affine=False))


@pytest.mark.parametrize("options", [{}, {"eps_mode": "clamp", "fused": False, "process_group": object()}])
def test_a_reverted_model_equals_the_original(options, snapshot):
    model = make_model()
    before = snapshot(model)

    assert revert_model(convert_model(model, **options)) is model

    assert snapshot(model) == before


def test_a_model_that_was_never_converted_stays_as_it_is(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3), SynchronizedBatchNorm2d(3))
    before = snapshot(model)

    revert_model(model)

    assert snapshot(model) == before


def test_changes_since_the_conversion_stay():
    model = convert_model(nn.Sequential(nn.BatchNorm1d(3)))
    model(torch.randn(8, 3))
    model.eval().double()
    model[0].note = "mine"
    learned = model.state_dict()

    revert_model(model)

    assert not model[0].training
    assert model[0].note == "mine"
    assert all(torch.equal(value, learned[key]) for key, value in model.state_dict().items())
    assert model[0].running_mean.dtype is torch.float64


def test_an_option_that_was_set_by_hand_is_removed_with_the_conversion():
    model = convert_model(nn.Sequential(nn.BatchNorm2d(3)))
    model[0].fused = False

    revert_model(model)

    assert "fused" not in vars(model[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_converted_model_can_be_reverted(copied):
    model = copied(convert_model(nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))))

    revert_model(model)

    assert [type(layer) for layer in model] == [nn.BatchNorm2d, nn.SyncBatchNorm]
    assert model[1].process_group is None


def test_a_part_of_a_model_can_be_reverted_alone():
    model = convert_model(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))))

    revert_model(model[1])

    assert type(model[0]) is SynchronizedBatchNorm2d
    assert type(model[1][0]) is nn.BatchNorm2d


def test_a_layer_whose_class_has_changed_since_is_an_error_that_names_it(snapshot):
    model = convert_model(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    before = snapshot(model)

    with pytest.raises(ValueError, match=r"'1' to be a SynchronizedBatchNorm2d.*ParametrizedSynchronized"):
        revert_model(model)

    assert snapshot(model) == before


def test_a_layer_parametrized_for_a_while_can_be_reverted():
    model = convert_model(nn.Sequential(nn.BatchNorm2d(3)))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    parametrize.remove_parametrizations(model[0], "weight")

    revert_model(model)

    assert type(model[0]) is nn.BatchNorm2d
