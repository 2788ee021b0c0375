"""A layer whose bound forward the model keeps stays as it is, with a warning."""

import functools
import warnings

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model, inspect_model, revert_model
from syncbn_core import SynchronizedBatchNorm1d
from syncbn_parallel import DataParallelWithCallback


class Net(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.other = nn.BatchNorm1d(3)
        self.kept = keep(self)

    def forward(self, x):
        return self.other(self.bn(x))


KEPT = {
    "bound forward": lambda net: net.bn.forward,
    "list": lambda net: [net.other, net.bn.forward],
    "dict of tuples": lambda net: {"steps": ("bn", net.bn.forward)},
    "partial": lambda net: functools.partial(net.bn.forward),
}
HARMLESS = {
    "the layer": lambda net: [net.bn],
    "its call": lambda net: net.bn.__call__,
    "the forward of the net": lambda net: net.forward,
    "another method": lambda net: net.bn.reset_running_stats,
    "a list that holds itself": lambda net: (kept := []).append(kept) or kept,
}


@pytest.mark.parametrize("way", KEPT)
def test_the_layer_is_left_alone_and_the_warning_names_the_attribute(way):
    net = Net(KEPT[way])
    reason = "'kept' holds its forward, which would still be the unsynchronized one: store the layer itself"
    assert [row.outcome for row in inspect_model(net).rows] == [reason, "SynchronizedBatchNorm1d"]
    with pytest.warns(UserWarning, match=f"'bn': {reason}"):
        convert_model(net)
    assert type(net.bn) is nn.BatchNorm1d
    assert type(net.other) is SynchronizedBatchNorm1d


def test_it_is_found_inside_a_sub_module():
    net = nn.Sequential(Net(KEPT["bound forward"]))
    with pytest.warns(UserWarning, match=r"'0\.bn': '0\.kept' holds its forward"):
        convert_model(net)


@pytest.mark.parametrize("way", HARMLESS)
def test_what_leads_to_the_layer_or_to_another_method_is_no_reason(way):
    net = Net(HARMLESS[way])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_model(net)
    assert type(net.bn) is SynchronizedBatchNorm1d
    assert type(revert_model(net).bn) is nn.BatchNorm1d


def test_the_layer_itself_in_the_attribute_synchronizes():
    net = Net(lambda net: [net.bn])
    whole = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    x = torch.randn(7, 3)
    torch.testing.assert_close(DataParallelWithCallback(convert_model(net), ["cpu"] * 3)(x), whole(x))
