"""What a forward assigns to its module, or puts into its containers: as in the single model, or a warning."""

import copy
import warnings
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback


class Counts(nn.Module):
    """Assigns to itself, and computes with what it has assigned in earlier forwards."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("history", torch.zeros(1))
        self.calls = 0
        self.rate = 1.0
        self.warm = True
        self.scratch = None

    def forward(self, x):
        self.steps = self.steps + 1
        self.history = torch.cat([self.history, self.steps[None]])
        self.calls += 1
        self.rate *= 0.5
        self.warm = self.calls < 2
        self.scratch = self.linear(x)
        return self.scratch * self.steps * self.calls * self.rate + self.history.sum() + self.warm


def run(model, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        yield model(torch.randn(7, 3))


def test_buffers_and_numbers_that_a_forward_assigns_are_those_of_the_single_model():
    whole = nn.Sequential(Counts(), nn.Identity())
    net = copy.deepcopy(whole)
    model = DataParallelWithCallback(net, ["cpu"] * 3)
    for expected, actual in zip(run(whole), run(model), strict=True):
        torch.testing.assert_close(actual, expected)
    assert net[0].calls == whole[0].calls == 3
    assert (net[0].rate, net[0].warm) == (whole[0].rate, whole[0].warm)
    torch.testing.assert_close(dict(net.named_buffers()), dict(whole.named_buffers()))
    assert net[0].scratch is None  # a part of the batch, which the whole model does not have


class Samples(nn.Module):
    seen = 0

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x


def test_a_number_that_differs_between_replicas_is_warned_of_once():
    net = nn.Sequential(Samples())
    model = DataParallelWithCallback(net, ["cpu"] * 3)
    with pytest.warns(UserWarning, match=r"to '0\.seen', got \[3, 3, 1\]: the model keeps 0") as caught:
        model(torch.randn(7, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(7, 3))
    assert caught[0].filename == __file__
    assert net[0].seen == 0


def test_a_failed_forward_assigns_nothing():
    class Fails(Samples):
        def forward(self, x):
            self.seen += 1
            raise ValueError("no")

    net = Fails()
    with pytest.raises(ValueError, match="no"):
        DataParallelWithCallback(net, ["cpu"] * 2)(torch.randn(4, 3))
    assert net.seen == 0


FILLED = {
    "dict": (dict, lambda kept, y: kept.update(y=y)),
    "ordered dict": (OrderedDict, lambda kept, y: kept.update(y=y)),
    "list": (list, lambda kept, y: kept.append(y)),
    "set": (set, lambda kept, y: kept.add(y)),
    "deque": (deque, lambda kept, y: kept.append(y)),
}


class Keeps(nn.Module):
    def __init__(self, make, put):
        super().__init__()
        self.kept, self.put = make(), put

    def forward(self, x):
        y = x.tanh()
        self.put(self.kept, y)
        return y


@pytest.mark.parametrize("kind", FILLED)
def test_tensors_in_a_container_that_replicas_share_are_warned_of(kind):
    model = DataParallelWithCallback(nn.Sequential(Keeps(*FILLED[kind])), ["cpu"] * 2)
    with pytest.warns(
        UserWarning, match=r"got '0\.kept', a \w+, filled with tensors: all replicas share it"
    ) as caught:
        model(torch.randn(4, 3))
    assert [w.filename for w in caught] == [__file__]


def test_a_hook_that_stores_features_on_the_model_is_warned_of():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    net.features = {}
    net[0].register_forward_hook(lambda module, inputs, output: net.features.update(first=output))
    with pytest.warns(UserWarning, match="got 'features', a dict, filled with tensors"):
        DataParallelWithCallback(net, ["cpu"] * 2)(torch.randn(4, 3))


QUIET = {
    "a counter": lambda self, x: self.kept.__setitem__("calls", self.kept.get("calls", 0) + 1),
    "an attribute set anew": lambda self, x: setattr(self, "kept", {"y": x.tanh()}),
    "emptied again": lambda self, x: (self.kept.__setitem__(len(x), x), self.kept.pop(len(x))),
    "a tensor that was there before": lambda self, x: self.kept.update(self.kept),
}


@pytest.mark.parametrize("kind", QUIET)
def test_containers_that_hold_no_new_tensors_are_not_warned_of(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = {"table": torch.ones(3)}

        def forward(self, x):
            QUIET[kind](self, x)
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DataParallelWithCallback(Net(), ["cpu"] * 2)(torch.randn(4, 3))
