"""Checkpoints and whole-model pickles of a vendored `sync_batchnorm` folder."""

from __future__ import annotations

import io
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn_comm
import syncbn_core
from syncbn_core import SynchronizedBatchNorm2d
from syncbn_parallel import DataParallelWithCallback


class OldMaster:
    """Pickles by its callback alone, as its documented protocol says."""

    def __init__(self, master_callback):
        self.master_callback = master_callback

    def __getstate__(self):
        return {"master_callback": self.master_callback}


class OldLayer(_BatchNorm):
    """Has the attributes of the old layer; its class is looked up by the old names when it is loaded."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self._sync_master = OldMaster(self._data_parallel_master)
        self._is_parallel, self._parallel_id, self._slave_pipe = False, None, None

    def _check_input_dim(self, input):
        pass

    def _data_parallel_master(self, messages):
        raise AssertionError("the old layer")


for stand_in, module, name in (
    (OldMaster, "sync_batchnorm.comm", "SyncMaster"),
    (OldLayer, "sync_batchnorm.batchnorm", "SynchronizedBatchNorm2d"),
):
    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name


@pytest.fixture
def old_folder(monkeypatch):
    """Put the stand-ins at the old import paths; the returned function puts ours there."""

    def put(comm, batchnorm):
        for name, members in (
            ("sync_batchnorm", {}),
            ("sync_batchnorm.comm", comm),
            ("sync_batchnorm.batchnorm", batchnorm),
        ):
            module = types.ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)

    put({"SyncMaster": OldMaster}, {"SynchronizedBatchNorm2d": OldLayer})
    return lambda: put(vars(syncbn_comm), vars(syncbn_core))


def test_a_whole_model_pickle_loads_and_synchronizes(old_folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OldLayer(4)).double()
    model[1].running_mean.fill_(0.5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    old_folder()
    loaded = torch.load(file, weights_only=False)

    assert type(loaded[1]) is SynchronizedBatchNorm2d
    assert loaded[1].running_mean.tolist() == [0.5] * 4
    whole = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    whole.load_state_dict(loaded.state_dict())
    x = torch.randn(7, 3, 2, 2, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(
            DataParallelWithCallback(loaded, ["cpu"] * 3)(x), whole(x), rtol=1e-11, atol=1e-11
        )
    for ours, theirs in zip(loaded.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_checkpoint_of_a_fork_with_more_buffers_loads_without_them():
    """As docs/migrating.md says: the running statistics are there under torch's names too."""
    model = nn.Sequential(SynchronizedBatchNorm2d(4))
    extra = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")
    checkpoint = {**model.state_dict(), **{f"0.{name}": torch.zeros(4) for name in extra}}
    checkpoint["0.running_mean"] = torch.arange(4.0)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(checkpoint)
    model.load_state_dict({key: value for key, value in checkpoint.items() if not key.endswith(extra)})
    assert model[0].running_mean.tolist() == [0, 1, 2, 3]
