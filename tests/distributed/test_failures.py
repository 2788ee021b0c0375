"""Replicas and processes: if one fails, all others get an error that names the layer in the model."""

import os

import pytest
import torch
from torch import nn

from syncbn_comm import BrokenSyncError
from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

GROUP_SECONDS = 5.0


class DiesInProcessOne(nn.Module):
    """Returns its input, but ends process 1."""

    def __init__(self, rank: int, event: str) -> None:
        super().__init__()
        self.rank, self.event = rank, event

    def forward(self, x):
        if self.rank == 1 and self.event == "dies":
            os._exit(3)
        if self.rank == 1:
            raise OSError("no such image")
        return x


def run_into_it(world, event):
    net = nn.Sequential(nn.BatchNorm2d(4), DiesInProcessOne(world.rank, event), nn.BatchNorm2d(4))
    model = DataParallelWithCallback(convert_model(net), ["cpu"] * 3)
    try:
        model(torch.randn(6, 4, 3, 3))
    except BrokenSyncError as error:
        return str(error), error.__notes__


@pytest.mark.parametrize("event", [pytest.param("dies", marks=pytest.mark.full), "raises"])
def test_all_replicas_of_the_others_get_an_error_that_names_the_layer(event, new_processes):
    survivor, other = new_processes(2, GROUP_SECONDS).outcomes(run_into_it, event)
    message, notes = survivor["result"]
    start = "process 0 (of 0 to 1) could not synchronize with the others in the forward of '2' (call 1): "
    assert message.startswith(start)
    assert "replica 0" in notes[0]
    assert other is None if event == "dies" else "no such image" in other["error"]
