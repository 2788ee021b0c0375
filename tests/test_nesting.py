"""Models inside of models, beside each other, and layers that are used twice."""

import threading

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 1e-12, "atol": 1e-12}
JOIN_SECONDS = 60


class UsesALayerTwice(nn.Module):
    """Both calls normalize, and both move the running statistics."""

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
        """Runs another data-parallel model, which is no part of this one, half way through."""

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


def test_two_models_in_two_threads_do_not_meet(residual_net, split_as, train_step, assert_close):
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
