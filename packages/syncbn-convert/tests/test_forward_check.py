"""A class that derives from a synchronized layer but does not run its forward is refused, with the reason."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn_convert import convert_model, inspect_model, register_conversion
from syncbn_core import SynchronizedBatchNorm2d
from syncbn_parallel import DataParallelWithCallback

Base = SynchronizedBatchNorm2d


def batch_norm(layer, x):
    """Normalize as a copy of torch's own forward does."""
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training)


class CallsFunctional(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum
        ).relu()


class CallsFunctionalInAMethod(nn.BatchNorm2d):
    def forward(self, x):
        return self.normalized(x).relu()

    def normalized(self, x):
        return batch_norm(self, x)


class CallsTorchsForwardByName(nn.BatchNorm2d):
    def forward(self, x):
        return nn.BatchNorm2d.forward(self, x).relu()


class CallsAnotherPartOfSuper(nn.BatchNorm2d):
    def forward(self, x):
        super()._check_input_dim(x)
        return batch_norm(self, x).relu()


class CallsSuper(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class CallsSuperOfTheOldForm(nn.BatchNorm2d):
    def forward(self, x):
        return super(CallsSuperOfTheOldForm, self).forward(x).relu()  # noqa: UP008


class CallsSuperInAMethod(nn.BatchNorm2d):
    def forward(self, x):
        return self.normalized(x).relu()

    def normalized(self, x):
        return super().forward(x)


class CallsSuperInAnInnerFunction(nn.BatchNorm2d):
    def forward(self, x):
        parent = super()

        def normalized(x):
            return parent.forward(x)

        return normalized(x).relu()


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def decorated_without_wraps(function):
    return lambda *args: function(*args)


class CallsSuperInsideADecorator(nn.BatchNorm2d):
    @decorated
    def forward(self, x):
        return super().forward(x).relu()


class CallsSuperInsideAPlainDecorator(nn.BatchNorm2d):
    @decorated_without_wraps
    def forward(self, x):
        return super().forward(x).relu()


BYPASSING = [
    CallsFunctional,
    CallsFunctionalInAMethod,
    CallsTorchsForwardByName,
    CallsAnotherPartOfSuper,
]
REACHING = [
    CallsSuper,
    CallsSuperOfTheOldForm,
    CallsSuperInAMethod,
    CallsSuperInAnInnerFunction,
    CallsSuperInsideADecorator,
    CallsSuperInsideAPlainDecorator,
]


def combined(source):
    return type(f"Synchronized{source.__name__}", (source, Base), {})


def synchronizes(layer):
    """Whether four replicas of uneven sizes give what the whole batch gives."""
    torch.manual_seed(0)
    layer = layer.double()
    x = torch.randn(7, 3, 4, 4, dtype=torch.float64)
    x[0] += 5
    whole = nn.BatchNorm2d(3).double()(x).relu()
    y = DataParallelWithCallback(layer, ["cpu"] * 4)(x)
    return torch.allclose(y, whole, atol=1e-12)


@pytest.mark.parametrize("source", BYPASSING)
def test_a_class_whose_forward_normalizes_by_itself_is_refused_when_it_is_registered(source):
    target = combined(source)
    assert not synchronizes(target(3))
    text = (
        rf"expected a class that synchronizes, got {target.__name__}, which runs {source.__name__}\.forward, "
        r"which does not call super\(\)\.forward: each replica would normalize by its own batch\. "
        rf"Give {target.__name__} a forward that calls SynchronizedBatchNorm2d\.forward\(self, x\)"
    )
    with pytest.raises(TypeError, match=text):
        register_conversion(source, target)
    with pytest.warns(UserWarning, match=f"'0': {source.__name__} is a subclass of BatchNorm2d"):
        assert type(convert_model(nn.Sequential(source(3)))[0]) is source  # nothing has been registered


@pytest.mark.parametrize("source", REACHING)
def test_a_class_whose_forward_goes_on_to_the_next_is_accepted_and_synchronizes(source):
    with register_conversion(source, combined(source)):
        model = convert_model(nn.Sequential(source(3)))
    assert inspect_model(model).converted
    assert synchronizes(model[0])


def test_the_forward_that_the_error_asks_for_is_accepted_and_synchronizes():
    class Mended(CallsFunctional, SynchronizedBatchNorm2d):
        def forward(self, x):
            return SynchronizedBatchNorm2d.forward(self, x).relu()

    with register_conversion(CallsFunctional, Mended):
        model = convert_model(nn.Sequential(CallsFunctional(3)))
    assert synchronizes(model[0])


def test_the_same_by_the_name_in_the_package_is_accepted():
    import syncbn_core

    class Mended(CallsFunctional, SynchronizedBatchNorm2d):
        def forward(self, x):
            return syncbn_core.SynchronizedBatchNorm2d.forward(self, x).relu()

    with register_conversion(CallsFunctional, Mended):
        assert synchronizes(convert_model(CallsFunctional(3)))


def test_super_that_leads_to_a_forward_that_normalizes_by_itself_is_refused():
    class Outer(CallsFunctional):
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(TypeError, match=r"which runs CallsFunctional\.forward, which does not call super"):
        register_conversion(Outer, combined(Outer))


def test_a_subclass_of_ours_that_does_not_call_ours_is_refused():
    class Own(SynchronizedBatchNorm2d):
        def forward(self, x):
            return batch_norm(self, x)

    with pytest.raises(TypeError, match=r"which runs .*Own\.forward, which does not call super\(\)\.forward"):
        register_conversion(nn.BatchNorm2d, Own)


def test_a_forward_whose_code_cannot_be_read_is_accepted():
    class Unknown(SynchronizedBatchNorm2d):
        forward = torch.relu

    with register_conversion(nn.BatchNorm2d, Unknown):
        assert type(convert_model(nn.BatchNorm2d(3))) is Unknown


def test_a_layer_that_was_built_as_such_a_class_is_listed_and_warned_of():
    layer = combined(CallsFunctional)(3)
    model = nn.Sequential(layer, nn.BatchNorm2d(3))
    reason = "SynchronizedCallsFunctional runs CallsFunctional.forward, which does not call super().forward"

    report = inspect_model(model)
    assert [row.outcome for row in report.skipped] == [reason]
    assert str(report).endswith("1 synchronize, 1 do not")
    with pytest.warns(UserWarning, match="left 1 batch norm") as caught:
        convert_model(model)
    assert f"'0': {reason}" in str(caught[0].message)
    assert type(layer).__name__ == "SynchronizedCallsFunctional"


def test_a_factory_that_returns_such_a_layer_is_an_error_and_changes_nothing(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3), CallsFunctional(3))
    before = snapshot(model)
    with (
        register_conversion(CallsFunctional, lambda layer: nn.Sequential(combined(CallsFunctional)(3))),
        pytest.raises(
            TypeError, match=r"expected the replacement for '1' to synchronize, got a Synchronized"
        ),
    ):
        convert_model(model)
    assert snapshot(model) == before


def test_a_registered_class_that_is_no_synchronized_layer_is_not_said_to_synchronize():
    class Mine(nn.Sequential):
        pass

    with register_conversion(nn.Sequential, Mine):
        report = inspect_model(nn.Sequential(nn.BatchNorm2d(3)))

    assert [(row.outcome, row.synchronizes_over) for row in report.rows] == [
        ("Mine", ""),
        ("SynchronizedBatchNorm2d", "replicas, default group"),
    ]
    assert str(report).endswith("1 synchronize, 0 do not")
