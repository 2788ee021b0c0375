"""Which layers convert, wherever they are, and what stays as it was."""

import pickle

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model
from syncbn_core import (
    THIS_PROCESS,
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

CLASSES = [
    (nn.BatchNorm1d, SynchronizedBatchNorm1d),
    (nn.BatchNorm2d, SynchronizedBatchNorm2d),
    (nn.BatchNorm3d, SynchronizedBatchNorm3d),
    (nn.SyncBatchNorm, SynchronizedBatchNorm),
]


@pytest.mark.parametrize(("before", "after"), CLASSES)
def test_a_layer_by_itself_is_converted_in_place(before, after):
    layer = before(3)

    assert convert_model(layer) is layer
    assert type(layer) is after


@pytest.mark.parametrize(("before", "after"), CLASSES)
def test_layers_in_every_kind_of_container_are_converted(before, after):
    model = nn.ModuleDict(
        {
            "list": nn.ModuleList([nn.Sequential(nn.Linear(3, 3), before(3))]),
            "direct": before(3),
            "none": None,
        }
    )

    convert_model(model)

    assert type(model["list"][0][1]) is type(model["direct"]) is after


@pytest.mark.parametrize(
    "other",
    [
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.GroupNorm(1, 3),
        nn.LayerNorm(3),
        nn.LazyInstanceNorm1d(),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
    ],
)
def test_other_layers_stay_as_they_are(other, snapshot):
    model = nn.Sequential(other)
    before = snapshot(model)

    convert_model(model)

    assert snapshot(model) == before


def test_the_neighbors_of_parametrized_layers_are_converted():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))

    convert_model(model)

    assert type(model[1]) is SynchronizedBatchNorm2d


def test_a_layer_under_two_names_stays_one_layer():
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.Sequential(shared))

    convert_model(model)

    assert model[0] is model[1][0] is shared
    assert type(shared) is SynchronizedBatchNorm2d


def test_an_optimizer_built_before_trains_the_converted_model():
    model = nn.Sequential(nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    convert_model(model)
    (model(torch.randn(4, 3)) * torch.randn(4, 3)).sum().backward()
    optimizer.step()

    assert not torch.equal(model[0].weight, torch.ones(3))


def test_a_state_dict_from_before_has_the_same_keys_in_the_same_order_and_the_same_tensors():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
    before = model.state_dict(keep_vars=True)

    after = convert_model(model).state_dict(keep_vars=True)

    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)


def test_converting_twice_is_converting_once(snapshot):
    model = convert_model(nn.Sequential(nn.BatchNorm2d(3)), fused=False)
    before = snapshot(model)

    convert_model(model, eps_mode="clamp")

    assert snapshot(model) == before


def test_the_options_are_set_on_the_layers_that_convert():
    model = nn.Sequential(nn.BatchNorm2d(3), SynchronizedBatchNorm2d(3))

    convert_model(model, process_group=THIS_PROCESS, eps_mode="clamp", fused=False)

    assert (model[0].process_group, model[0].eps_mode, model[0].fused) == (THIS_PROCESS, "clamp", False)
    assert (model[1].process_group, model[1].eps_mode, model[1].fused) == (None, None, True)


def test_a_converted_layer_knows_its_name_in_the_model():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)))

    convert_model(model)

    with pytest.raises(ValueError, match=r"at '0\.0', got"):
        model(torch.zeros(1, 4, 2, 2))


def test_a_copy_is_converted_where_inplace_is_false(snapshot):
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, shared)
    before = snapshot(model)

    converted = convert_model(model, inplace=False)

    assert snapshot(model) == before
    assert type(converted[0]) is SynchronizedBatchNorm2d
    assert converted[0] is converted[1]


def test_a_converted_model_survives_pickling():
    model = convert_model(nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3)), fused=False)

    loaded = pickle.loads(pickle.dumps(model))

    assert [type(layer) for layer in loaded] == [SynchronizedBatchNorm2d, SynchronizedBatchNorm]
    assert loaded[0].fused is False


def test_a_layer_on_the_meta_device_is_converted_without_being_materialized():
    layer = convert_model(nn.BatchNorm2d(3, device="meta"))

    assert type(layer) is SynchronizedBatchNorm2d
    assert layer.weight.device.type == "meta"
