"""A replica is a member of its group while it runs, whoever calls it, and however its class is called."""

import pytest
import torch
from torch import nn

from syncbn_comm import ReplicaLeftError
from syncbn_parallel import DataParallelWithCallback, patch_replication_callback

SECONDS = 60.0  # of waiting, before a test gives up


@pytest.fixture
def called(centre_class):
    """Return a net class that defines ``__call__`` and not ``forward``."""

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.centre = centre_class()

        def __call__(self, x):
            return x if x.max() > 50 else self.centre(x)

    return Called


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("early", [0, 1])
def test_a_class_that_defines_call_leaves_as_one_that_defines_forward(called, foreign, ours, early):
    if ours:
        model = DataParallelWithCallback(called(), ["cpu"] * 2, timeout=SECONDS)
    else:
        model = patch_replication_callback(foreign(called(), 2))
    x = torch.randn(4, 3)
    bad = x.clone()
    bad[2 * early] = 99
    for _ in range(2):
        torch.testing.assert_close(model(x), x - x.mean(0))
        with pytest.raises(ReplicaLeftError, match=f"replica {early} finished without reaching 'centre'"):
            model(bad)


def test_a_replica_of_such_a_class_is_an_instance_of_it_by_the_same_name(called):
    seen = []

    class Look(called):
        def __call__(self, x):
            seen.append((isinstance(self, Look), type(self).__name__, type(self).__module__))
            return super().__call__(x)

    DataParallelWithCallback(Look(), ["cpu"] * 2)(torch.randn(4, 3))
    assert seen == [(True, "Look", __name__)] * 2


def test_a_call_that_goes_on_to_forward_is_one_membership(centre_class):
    class Both(centre_class):
        def __call__(self, x):
            y = super().__call__(x)
            return y + super().__call__(x)

    x = torch.randn(6, 3)
    torch.testing.assert_close(DataParallelWithCallback(Both(), ["cpu"] * 3)(x), 2 * (x - x.mean(0)))


def test_a_module_that_calls_itself_stays_a_member_until_the_last_return(centre_class):
    class Recursive(centre_class):
        def forward(self, x, depth=2):
            y = super().forward(x)
            return y if depth == 0 else self(y.tanh(), depth - 1) + super().forward(y)

    x = torch.randn(6, 3).double()
    expected, actual = Recursive()(x), DataParallelWithCallback(Recursive(), ["cpu"] * 3)(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_failure_in_such_a_class_is_noted(called):
    class Failing(called):
        def __call__(self, x):
            raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck") as caught:
        DataParallelWithCallback(Failing(), ["cpu"] * 2)(torch.ones(2))
    (note,) = caught.value.__notes__
    assert note.startswith("raised in replica ")
    assert note.endswith("(of 0 to 1) on cpu")
