"""Warnings of models that run, but most likely not as their user expects."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback

MESSAGE = "expected batch-norm layers that synchronize over the replicas"


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2)))


class Synchronizing(nn.BatchNorm1d):
    """Stands for a layer that has a replication callback."""

    def __data_parallel_replicate__(self, ctx, copy_id):
        pass


def hints(model, x=None):
    """Return the messages of the hints in one forward."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.randn(4, 2) if x is None else x)
    return [warning for warning in caught if str(warning.message).startswith(MESSAGE)]


def test_a_model_whose_batch_norms_do_not_synchronize_gets_one_warning():
    model = DataParallelWithCallback(net(), ["cpu"] * 2)
    (hint,) = hints(model)
    assert "got 2 that do not (the first is '1')" in str(hint.message)
    assert "convert_model(model)" in str(hint.message)
    assert "warnings.filterwarnings('ignore'" in str(hint.message)
    assert hints(model) == []
    assert len(hints(DataParallelWithCallback(net(), ["cpu"] * 2))) == 1


def test_the_hint_points_at_the_callers_line():
    model = DataParallelWithCallback(net(), ["cpu"] * 2)
    (hint,) = hints(model)
    assert hint.filename == __file__


def test_the_remedy_in_the_hint_silences_it():
    model = DataParallelWithCallback(net(), ["cpu"] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "expected batch-norm layers that synchronize")
        model(torch.randn(4, 2))


def frozen(module):
    module.eval()
    return module


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        Synchronizing(2),
        nn.Sequential(nn.BatchNorm1d(2), Synchronizing(2)),  # somebody has chosen
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.Sequential(nn.Linear(2, 2), frozen(nn.BatchNorm1d(2))),
        frozen(net()),
    ],
    ids=["none", "synchronizes", "one synchronizes", "no statistics", "frozen", "evaluation"],
)
def test_other_models_get_no_warning(module):
    assert hints(DataParallelWithCallback(module, ["cpu"] * 2)) == []


def test_a_model_in_evaluation_gets_its_warning_when_it_trains():
    model = DataParallelWithCallback(net(), ["cpu"] * 2).eval()
    assert hints(model) == []
    assert len(hints(model.train())) == 1


def test_a_single_replica_gets_no_warning():
    model = DataParallelWithCallback(nn.BatchNorm2d(2), ["cpu"] * 2)
    assert hints(model, torch.randn(1, 2, 3, 3)) == []
    assert hints(DataParallelWithCallback(net(), ["cpu"])) == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_warning_leaves_nothing_on_the_model(duplicate):
    model = DataParallelWithCallback(net(), ["cpu"] * 2)
    before = set(vars(model))
    hints(model)
    assert set(vars(model)) == before
    assert len(hints(duplicate(model))) == 1


@pytest.mark.usefixtures("no_accelerator")
def test_a_model_without_devices_says_that_it_runs_alone_and_what_to_pass():
    with pytest.warns(
        UserWarning, match=r"no GPU or other accelerator.*runs the module itself.*device_ids=\['cpu'"
    ) as w:
        model = DataParallelWithCallback(nn.Linear(2, 2))
    assert [warning.filename for warning in w] == [__file__]
    x = torch.ones(3, 2)
    assert torch.equal(model(x), model.module(x))


def test_the_wrapper_shows_its_devices():
    shown = repr(DataParallelWithCallback(nn.Linear(2, 2), ["cpu"] * 2, dim=1, timeout=5, output_device=-1))
    assert shown.splitlines()[1].strip() == "device_ids=['cpu', 'cpu'], output_device='cpu', dim=1, timeout=5"
    assert "(module): Linear" in shown
