"""patch_replication_callback on data parallelism that somebody else wrote."""

import copy
import pickle

import pytest
import torch
from torch import nn

from syncbn_comm import BrokenSyncError
from syncbn_parallel import DataParallelWithCallback, patch_replication_callback


class Failing(nn.Module):
    """Raises ``fault['error']`` in replica ``fault['rank']``; all copies share ``fault`` by reference."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.rank = None

    def __data_parallel_replicate__(self, ctx, copy_id):
        self.rank = copy_id

    def forward(self, x):
        if self.fault and self.rank == self.fault["rank"]:
            raise self.fault["error"]
        return x


@pytest.mark.parametrize("batch", [6, 5, 2, 1])
def test_a_patched_foreign_class_synchronizes(centred_net, batch, foreign):
    model = patch_replication_callback(foreign(centred_net(), 3))
    x = torch.randn(batch, 4).double()
    torch.testing.assert_close(model(x), centred_net()(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("at", [0, 3, 9])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_failure_in_a_patched_foreign_class_reaches_everybody(centred_net, at, rank, foreign):
    fault = {"rank": rank, "error": ValueError("out of luck")}
    net = centred_net().insert(at, Failing(fault))
    model = patch_replication_callback(foreign(net, 3))
    x = torch.randn(6, 4).double()
    with pytest.raises((ValueError, BrokenSyncError)):
        model(x)
    assert fault["error"].__notes__ == [
        f"raised in replica {rank} (of 0 to 2) on cpu, in layer '{at}' (Failing)"
    ]
    assert fault["error"] in model.errors
    # Behind the last synchronizing layer nobody waits any more.
    assert len(model.errors) == (1 if at == 9 else 3)
    assert all(e is fault["error"] or e.__cause__ is fault["error"] for e in model.errors)
    fault.clear()
    torch.testing.assert_close(model(x), centred_net()(x), rtol=0, atol=1e-13)


def test_a_hook_that_raises_reaches_the_others_in_a_patched_foreign_class(centred_net, foreign):
    net = centred_net()

    def hook(module, args):
        if module[1].replica.rank == 1:
            raise ValueError("hooked")

    net.register_forward_pre_hook(hook)
    with pytest.raises((ValueError, RuntimeError)):
        patch_replication_callback(model := foreign(net, 3))(torch.zeros(6, 4).double())
    assert [str(error) for error in model.errors if isinstance(error, ValueError)] == ["hooked"]
    assert len(model.errors) == 3


def test_patching_returns_the_object_and_changes_no_other(centred_net, foreign):
    model, other = foreign(centred_net(), 2), foreign(centred_net(), 2)
    assert patch_replication_callback(model) is model
    assert "replicate" in vars(model)
    assert "replicate" not in vars(other)
    assert "replicate" not in vars(nn.Module)


def test_patching_twice_calls_the_callbacks_once(foreign):
    calls = []

    class Recorder(nn.Module):
        def __data_parallel_replicate__(self, ctx, copy_id):
            calls.append(copy_id)

        def forward(self, x):
            return x

    model = patch_replication_callback(patch_replication_callback(foreign(Recorder(), 2)))
    model(torch.ones(4))
    assert calls == [0, 1]


def test_a_replicate_set_on_the_object_is_kept(foreign):
    calls = []
    model = foreign(nn.Linear(2, 2), 2)
    original = model.replicate

    def own(module, device_ids):
        calls.append(device_ids)
        return original(module, device_ids)

    model.replicate = own
    patch_replication_callback(model)(torch.ones(4, 2))
    assert calls == [[0, 1]]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_patched_and_replicate_their_own_module(duplicate, foreign):
    model = patch_replication_callback(foreign(nn.Linear(2, 2), 2))
    again = duplicate(model)
    assert again.replicate is not model.replicate
    with torch.no_grad():
        again.module.weight.zero_()
        again.module.bias.zero_()
    assert again(torch.ones(4, 2)).eq(0).all()
    assert not model(torch.ones(4, 2)).eq(0).all()


@pytest.mark.usefixtures("no_accelerator")
def test_a_stock_data_parallel_without_gpu_still_runs_its_module_alone():
    model = patch_replication_callback(nn.DataParallel(nn.Linear(4, 2)))
    assert model(torch.ones(3, 4)).shape == (3, 2)


def test_data_parallel_with_callback_needs_no_patch():
    model = DataParallelWithCallback(nn.Linear(4, 2), ["cpu", "cpu"])
    assert patch_replication_callback(model) is model
    assert "replicate" not in vars(model)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, nn.DataParallel])
def test_an_argument_that_is_not_a_data_parallel_is_refused(thing):
    with pytest.raises(TypeError, match=r"expected an nn\.DataParallel, got"):
        patch_replication_callback(thing)
