"""Process groups are neither lost, nor copied, nor written down.

To conversion a group is an opaque object; one that cannot be copied or pickled, like the real one, stands in.
"""

import copy
import pickle
import subprocess
import sys

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
    with pytest.warns(UserWarning, match="process_group of synchronized layers is not part"):
        pickled = pickle.dumps(convert_model(model, process_group=Group()))
    loaded = pickle.loads(pickled)

    assert loaded[0].process_group is loaded[1].process_group is None
    assert revert_model(loaded)[1].process_group is None


TRAIN_AND_REVERT = """
import sys, torch
import torch.distributed as dist
from torch import nn
from syncbn_convert import convert_model, revert_model

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
layer = nn.BatchNorm2d(3)
before = {**vars(layer)}
convert_model(layer)(torch.randn(2, 3, 4, 4)).sum().backward()
revert_model(layer)
after = vars(layer)
assert list(after) == list(before) and all(after[key] is before[key] for key in before), after.keys()
dist.destroy_process_group()
"""


def test_a_layer_that_ran_over_two_processes_reverts_to_what_it_was(tmp_path):
    command = [sys.executable, "-c", TRAIN_AND_REVERT, str(tmp_path / "rendezvous")]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
