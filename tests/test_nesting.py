"""Models inside and after each other; layers that are used twice, or called through attributes."""

import threading

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 1e-12, "atol": 1e-12}
JOIN_SECONDS = 60


class UsesALayerTwice(nn.Module):
    """Both calls normalize and update the running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.again = self.norm

    def forward(self, x):
        return self.again(torch.tanh(self.norm(x)))


@pytest.fixture
def x():
    return torch.randn(8, 4, dtype=torch.float64)


def test_one_layer_used_twice_in_one_forward_equals_the_whole_batch(x, split_as, train_step, assert_close):
    replicas = split_as(convert_model(UsesALayerTwice().double()), [3, 1, 4])
    assert_close(train_step(replicas, x), train_step(UsesALayerTwice().double(), x), **EXACT)


class TwoLevels(nn.Module):
    """A norm beside an inner model, that may itself run on replicas."""

    def __init__(self, wrap):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.inner = wrap(nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)))

    def forward(self, x):
        return self.inner(self.norm(x))


def two_levels(wrap):
    torch.manual_seed(0)
    return TwoLevels(wrap).double()


def test_replicas_of_a_part_of_a_model_equal_the_whole_batch(x, train_step):
    nested = two_levels(lambda inner: DataParallelWithCallback(inner, ["cpu"] * 2))
    actual = train_step(convert_model(nested), x)
    expected = train_step(two_levels(lambda inner: inner), x)
    torch.testing.assert_close(list(actual.values()), list(expected.values()), **EXACT)


def test_replicas_inside_replicas_are_an_error_that_says_what_to_do(x, split_as):
    model = convert_model(two_levels(lambda inner: DataParallelWithCallback(inner, ["cpu"] * 2)))
    with pytest.raises(RuntimeError, match="give all devices to the outer"):
        split_as(model, [4, 4])(x)


def test_a_forward_inside_a_forward_equals_the_whole_batch(x, split_as, train_step):
    class Calls(nn.Module):
        """Runs another data-parallel model, which is not part of this one, inside its forward."""

        def __init__(self, other):
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()
            self.call = other.forward

        def forward(self, x):
            return self.call(self.norm(x).detach())

    other = split_as(convert_model(nn.BatchNorm1d(4).double()), [1, 3])
    y = split_as(convert_model(Calls(other)), [4, 4])(x)
    normalized = nn.BatchNorm1d(4).double()(x)
    expected = torch.cat([nn.BatchNorm1d(4).double()(part) for part in normalized.split(4)])
    torch.testing.assert_close(y, expected, **EXACT)


class ThroughAttributes(nn.Module):
    """Its forward calls the layers through attributes, not by their registered names."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.kind = kind
        if kind == "hook":
            self.linear.register_forward_hook(lambda module, args, y: self.norm(y))

    def keep(self):
        """Do what a program does after the conversion, which exchanges the layers."""
        inner = self.forward
        if self.kind == "bound method":
            self.kept = self.run
        elif self.kind == "pairs":
            self.kept = [(self.linear, "linear"), (self.norm, "norm")]
        elif self.kind == "wrapped forward":
            self.forward = lambda *args: inner(*args)
        return self

    def run(self, x):
        return self.norm(self.linear(x))

    def forward(self, x):
        if self.kind == "hook":
            return self.linear(x)
        if self.kind == "bound method":
            return self.kept(x)
        if self.kind == "pairs":
            for layer, _ in self.kept:
                x = layer(x)
            return x
        return self.run(x)


@pytest.mark.parametrize("kind", ["bound method", "pairs", "wrapped forward", "hook"])
def test_layers_that_are_called_through_attributes_equal_the_whole_batch(
    kind, x, split_as, train_step, assert_close
):
    net = convert_model(ThroughAttributes(kind).double()).keep()
    whole = ThroughAttributes(kind).double().keep()
    replicas = split_as(net, [3, 1, 4])
    for _ in range(2):
        assert_close(train_step(replicas, x), train_step(whole, x), **EXACT)
    assert net.norm.num_batches_tracked == 2


def test_a_decoder_that_begins_in_place_after_an_encoder_equals_the_whole_batch(x, train_step):
    class TwoInARow(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            torch.manual_seed(1)
            self.encoder = wrap(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
            self.decoder = wrap(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.BatchNorm1d(4)))

        def forward(self, x):
            code = self.encoder(x)
            return self.decoder(code) + code

    actual = train_step(
        convert_model(TwoInARow(lambda m: DataParallelWithCallback(m, ["cpu"] * 2)).double()), x
    )
    expected = train_step(TwoInARow(lambda m: m).double(), x)
    torch.testing.assert_close(list(actual.values()), list(expected.values()), **EXACT)


def test_two_models_in_two_threads_do_not_affect_each_other(residual_net, split_as, train_step, assert_close):
    models = [split_as(convert_model(residual_net()), sizes) for sizes in ([2, 4], [1, 2, 3])]
    batches = [torch.randn(6, 3, 6, 6, dtype=torch.float64) for _ in models]
    steps = [[], []]

    def work(index):
        for _ in range(5):
            steps[index].append(train_step(models[index], batches[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    for batch, seen in zip(batches, steps, strict=True):
        whole = residual_net()
        assert len(seen) == 5
        for step in seen:
            assert_close(step, train_step(whole, batch), **EXACT)
