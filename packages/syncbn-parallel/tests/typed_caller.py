"""What a typed program may write; checked by ``mypy --strict``, and run by nobody."""

import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_parallel import (
    CallbackContext,
    DataParallelWithCallback,
    execute_replication_callbacks,
    patch_replication_callback,
    replicate,
)


class Net(nn.Module):
    """A module with the callback."""

    def __data_parallel_replicate__(self, ctx: CallbackContext, copy_id: int) -> None:
        name: str = ctx.name
        group: ReplicaGroup = ctx.group
        devices: tuple[torch.device, ...] = ctx.devices
        ctx.anything = (name, group, devices, ctx.num_replicas, copy_id)


net = Net()
replicas: list[Net] = replicate(net, ["cpu", torch.device("cpu")])
execute_replication_callbacks(replicas, group=ReplicaGroup(2), devices=[torch.device("cpu")] * 2)
model: DataParallelWithCallback[Net] = DataParallelWithCallback(net, ["cpu"] * 2, dim=0, timeout=None)
inner: Net = model.module
patched: nn.DataParallel[Net] = patch_replication_callback(nn.DataParallel(net))
