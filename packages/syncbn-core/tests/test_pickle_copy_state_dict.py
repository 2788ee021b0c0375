"""Layers are saved, copied, moved and loaded as torch's own are, before and after a forward in replicas."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from syncbn_core import (
    THIS_PROCESS,
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

pytestmark = pytest.mark.usefixtures("graph_kind")

NOT_PICKLED = "the process_group of synchronized layers is not part of a pickle"
EXACTLY = {"rtol": 0, "atol": 0}


class UnpicklableGroup:
    """Stands for a process group, which can be neither copied nor pickled."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle a process group")


@pytest.fixture(params=["fresh", "after a forward in replicas", "a replica itself"])
def layer(request, randomize, replicas_of):
    layer = randomize(
        SynchronizedBatchNorm2d(3, 0.2, 0.3, process_group=UnpicklableGroup(), eps_mode="clamp", fused=False)
    )
    layer.note = ["of the user"]
    if request.param == "fresh":
        return layer
    replicas = replicas_of(layer, 2)
    replicas.run(lambda replica, rank: replica(torch.randn(2, 3, 4, 4)))
    return replicas.modules[0] if request.param == "a replica itself" else layer


def settings(layer):
    return layer.eps, layer.momentum, layer.eps_mode, layer.fused, layer.note, layer.training


def test_a_pickle_has_everything_except_the_process_group(layer):
    with pytest.warns(UserWarning, match=NOT_PICKLED):
        loaded = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(loaded.state_dict(), layer.state_dict(), **EXACTLY)
    assert settings(loaded) == settings(layer)
    assert loaded.process_group is None
    assert layer.process_group is not None


def test_a_deep_copy_carries_the_process_group_by_reference(layer):
    clone = copy.deepcopy(layer)
    torch.testing.assert_close(clone.state_dict(), layer.state_dict(), **EXACTLY)
    assert settings(clone) == settings(layer)
    assert clone.process_group is layer.process_group
    assert clone.note is not layer.note
    assert not {t.data_ptr() for t in clone.state_dict().values()} & {
        t.data_ptr() for t in layer.state_dict().values()
    }


def test_a_deep_copy_of_a_model_keeps_one_shared_layer_one(layer):
    clone = copy.deepcopy(nn.ModuleList([layer, nn.Sequential(layer)]))
    assert clone[0] is clone[1][0]


def test_a_shallow_copy_carries_the_process_group_too(layer):
    assert copy.copy(layer).process_group is layer.process_group


def test_this_process_survives_pickles_and_copies_as_itself():
    layer = SynchronizedBatchNorm2d(3, process_group=THIS_PROCESS)
    assert pickle.loads(pickle.dumps(layer)).process_group is THIS_PROCESS
    assert copy.deepcopy(layer).process_group is THIS_PROCESS


def test_a_copy_of_a_replica_does_not_synchronize(replicas_of):
    replica = replicas_of(SynchronizedBatchNorm2d(3), 2).modules[1]
    for clone in (copy.deepcopy(replica), pickle.loads(pickle.dumps(replica)), copy.copy(replica)):
        clone(torch.randn(2, 3, 4, 4))  # would wait for the other replica


KINDS = pytest.mark.parametrize(
    ("kind", "dims"),
    [
        (SynchronizedBatchNorm1d, 2),
        (SynchronizedBatchNorm2d, 4),
        (SynchronizedBatchNorm3d, 5),
        (SynchronizedBatchNorm, 4),
    ],
)


@pytest.mark.pairwise
@KINDS
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_state_dicts_move_both_ways_between_torchs_layers_and_ours(
    kind, dims, options, randomize, stock_twin
):
    ours, fresh = randomize(kind(3, **options)), kind(3, **options)
    theirs = stock_twin(kind(3, **options), dims)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    fresh.load_state_dict(theirs.state_dict())
    assert list(fresh.state_dict()) == list(theirs.state_dict()) == list(ours.state_dict())
    torch.testing.assert_close(fresh.state_dict(), ours.state_dict(), **EXACTLY)


@KINDS
def test_a_change_of_class_makes_one_of_torchs_layers_ours(
    kind, dims, randomize, stock_twin, assert_equals_whole_batch
):
    layer = stock_twin(randomize(kind(3, dtype=torch.float64)), dims)
    layer.__class__ = kind
    chunks = [torch.randn(n, 3, *[2] * (dims - 2), dtype=torch.float64) for n in (2, 1)]
    assert_equals_whole_batch(layer, chunks, rtol=1e-9, atol=1e-12)
    assert str(copy.deepcopy(layer)) == str(pickle.loads(pickle.dumps(layer))) == str(kind(3))


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "move",
    [lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to("meta")],
    ids=["half", "double", "bfloat16", "meta"],
)
def test_a_layer_changes_device_and_dtype_as_torchs_own(move, layer, stock_twin):
    twin = move(stock_twin(layer, 4))
    for name, tensor in move(layer).state_dict().items():
        theirs = twin.state_dict()[name]
        assert (tensor.dtype, tensor.device, tensor.shape) == (theirs.dtype, theirs.device, theirs.shape)


def test_a_moved_layer_still_synchronizes(assert_equals_whole_batch, run_replicas):
    layer = SynchronizedBatchNorm2d(3)
    run_replicas(layer, [torch.randn(2, 3, 4, 4)] * 2)
    chunks = [torch.randn(n, 3, 2, 2, dtype=torch.float64) for n in (2, 1)]
    assert_equals_whole_batch(layer.double(), chunks, rtol=1e-12, atol=1e-12)


def test_device_and_dtype_are_those_asked_for():
    layer = SynchronizedBatchNorm2d(3, device="meta", dtype=torch.float64)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64


def test_resets_restore_a_new_layer(randomize):
    layer = randomize(SynchronizedBatchNorm2d(3))
    layer.num_batches_tracked.fill_(7)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), SynchronizedBatchNorm2d(3).state_dict(), **EXACTLY)


def test_the_repr_is_torchs_with_what_differs_from_the_defaults():
    assert repr(SynchronizedBatchNorm2d(3)) == "Synchronized" + repr(nn.BatchNorm2d(3))
    layer = SynchronizedBatchNorm1d(3, process_group=THIS_PROCESS, eps_mode="clamp", fused=False)
    assert repr(layer).endswith("eps_mode='clamp', fused=False, process_group=THIS_PROCESS)")
