"""Process groups are neither lost, nor copied, nor written down.

To conversion a group is an opaque object; one that cannot be copied or pickled, like the real one, stands in.
"""

import copy
import pickle

import pytest
from torch import nn

from syncbn_convert import convert_model, revert_model
from syncbn_core import THIS_PROCESS


class Group:
    def __reduce__(self):
        raise TypeError("cannot pickle a process group")


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=Group()))


def test_a_sync_batch_norm_keeps_its_own_group_when_none_is_given(model):
    group = model[1].process_group

    convert_model(model)

    assert model[1].process_group is group
    assert model[0].process_group is None


def test_a_given_group_takes_its_place_until_the_model_is_reverted(model):
    group, given = model[1].process_group, Group()

    convert_model(model, process_group=given)
    assert model[0].process_group is model[1].process_group is given

    revert_model(model)
    assert model[1].process_group is group
    assert "process_group" not in vars(model[0])


def test_the_scope_of_this_process_takes_its_place_too(model):
    convert_model(model, process_group=THIS_PROCESS)

    assert model[1].process_group is THIS_PROCESS


def test_a_converted_copy_holds_the_same_group(model):
    converted = convert_model(model, inplace=False)

    assert converted[1].process_group is model[1].process_group
    assert converted[1] is not model[1]


def test_a_copy_of_a_converted_model_reverts_to_the_same_group(model):
    group = model[1].process_group

    reverted = revert_model(copy.deepcopy(convert_model(model, process_group=Group())))

    assert reverted[1].process_group is group


def test_a_pickle_of_a_converted_model_drops_the_groups(model):
    loaded = pickle.loads(pickle.dumps(convert_model(model, process_group=Group())))

    assert loaded[0].process_group is loaded[1].process_group is None
    assert revert_model(loaded)[1].process_group is None
