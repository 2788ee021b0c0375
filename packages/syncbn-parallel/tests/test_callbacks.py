"""What the copies of a sub-module learn of each other."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_parallel import CallbackContext, execute_replication_callbacks, replicate


class Recorder(nn.Module):
    """Notes its calls in a list that all copies share by reference."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __data_parallel_replicate__(self, ctx, copy_id):
        self.calls.append((self, ctx, copy_id))


def test_every_copy_of_every_submodule_with_the_callback_is_called_master_first():
    calls = []
    net = nn.Sequential(Recorder(calls), nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Recorder(calls)))
    replicas = replicate(net, ["cpu"] * 3)
    execute_replication_callbacks(replicas)
    assert [(ctx.name, copy_id) for _, ctx, copy_id in calls] == [
        (name, copy_id) for copy_id in range(3) for name in ("0", "2.1")
    ]
    assert [module for module, _, _ in calls] == [m for r in replicas for m in (r[0], r[2][1])]


def test_the_copies_of_a_submodule_share_one_context_and_no_other_submodule_has_it():
    calls = []
    replicas = replicate(nn.Sequential(Recorder(calls), Recorder(calls)), ["cpu", "cpu"])
    execute_replication_callbacks(replicas)
    contexts = {name: {id(c) for _, c, _ in calls if c.name == name} for name in ("0", "1")}
    assert [len(ids) for ids in contexts.values()] == [1, 1]
    assert contexts["0"] != contexts["1"]


def test_the_context_tells_name_devices_number_and_group():
    calls = []
    group = ReplicaGroup(2)
    devices = [torch.device("cpu"), torch.device("meta")]
    replicas = replicate(nn.Sequential(nn.Linear(2, 2), Recorder(calls)), devices)
    execute_replication_callbacks(replicas, group=group, devices=devices)
    for _, ctx, _ in calls:
        assert isinstance(ctx, CallbackContext)
        assert (ctx.name, ctx.num_replicas, ctx.devices) == ("1", 2, tuple(devices))
        assert ctx.group is group


def test_without_devices_those_of_the_parameters_are_told():
    calls = []
    replicas = replicate(nn.Sequential(nn.Linear(2, 2), Recorder(calls)), ["cpu", "meta"])
    execute_replication_callbacks(replicas)
    assert [device.type for device in calls[0][1].devices] == ["cpu", "meta"]
    assert calls[0][1].group.world_size == 2


def test_the_model_itself_has_the_empty_name():
    calls = []
    execute_replication_callbacks(replicate(Recorder(calls), ["cpu"]))
    assert calls[0][1].name == ""


def test_a_shared_submodule_is_called_once_per_copy_under_its_first_name():
    calls = []
    shared = Recorder(calls)
    execute_replication_callbacks(replicate(nn.ModuleDict({"a": shared, "b": shared}), ["cpu", "cpu"]))
    assert [(ctx.name, copy_id) for _, ctx, copy_id in calls] == [("a", 0), ("a", 1)]


def test_the_others_can_read_what_the_master_sets_on_the_context():
    class Meeting(nn.Module):
        def __data_parallel_replicate__(self, ctx, copy_id):
            if copy_id == 0:
                ctx.table = "round"
            self.table = ctx.table

    replicas = replicate(Meeting(), ["cpu", "cpu"])
    execute_replication_callbacks(replicas)
    assert [replica.table for replica in replicas] == ["round", "round"]


def test_an_attribute_that_nobody_has_set_is_a_clear_error():
    context = CallbackContext("layer1.bn", (torch.device("cpu"),), ReplicaGroup(1))
    with pytest.raises(AttributeError, match=r"'table' on the context of 'layer1\.bn'"):
        _ = context.table


def test_a_context_can_be_copied():
    context = CallbackContext("layer1.bn", (torch.device("cpu"),), ReplicaGroup(1))
    assert copy.copy(context).name == "layer1.bn"


def test_a_callback_that_is_set_on_the_object_counts_as_one_of_the_class():
    module, calls = nn.Identity(), []
    module.__data_parallel_replicate__ = lambda ctx, copy_id: calls.append((ctx.name, copy_id))
    execute_replication_callbacks(replicate(nn.Sequential(module), ["cpu", "cpu"]))
    assert calls == [("0", 0), ("0", 1)]


def test_a_callback_that_is_set_on_the_object_as_a_method_is_called_on_the_copy():
    module = Recorder([])
    module.__data_parallel_replicate__ = module.__data_parallel_replicate__
    replicas = replicate(module, ["cpu", "cpu"])
    execute_replication_callbacks(replicas)
    assert [(copied, copy_id) for copied, _, copy_id in module.calls] == [(replicas[0], 0), (replicas[1], 1)]


def test_a_context_without_arguments_tells_nothing_but_takes_attributes():
    context = CallbackContext()
    context.sync_master = "master"
    assert context.sync_master == "master"
    assert not any(hasattr(context, name) for name in ("group", "devices", "num_replicas"))
    assert repr(context) == "CallbackContext(name='', num_replicas=None)"


def test_replicas_of_different_modules_are_refused():
    calls = []
    replicas = [nn.Sequential(Recorder(calls)), nn.Sequential(Recorder(calls), nn.ReLU())]
    with pytest.raises(ValueError, match="2 sub-modules in replica 0 and 3 in replica 1"):
        execute_replication_callbacks(replicas)


@pytest.mark.parametrize(("world_size", "devices"), [(3, 2), (2, 1)])
def test_a_group_or_devices_of_another_size_are_refused(world_size, devices):
    replicas = replicate(Recorder([]), ["cpu", "cpu"])
    with pytest.raises(ValueError, match="for 2 replicas"):
        execute_replication_callbacks(
            replicas, group=ReplicaGroup(world_size), devices=[torch.device("cpu")] * devices
        )


def test_an_empty_list_of_replicas_is_accepted():
    execute_replication_callbacks([])


def test_nothing_keeps_replicas_and_contexts_alive():
    calls = []
    replicas = replicate(nn.Sequential(Recorder(calls)), ["cpu", "cpu"])
    execute_replication_callbacks(replicas)
    alive = [weakref.ref(thing) for thing in (*replicas, calls[0][1])]
    gc.disable()
    try:
        del replicas
        calls.clear()
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()
