"""An error at any point leaves the model as it was."""

import pytest
from torch import nn

from syncbn_convert import convert_model, register_conversion, revert_model
from syncbn_core import SynchronizedBatchNorm2d


class Odd(nn.BatchNorm2d):
    pass


class Slotted(Odd, SynchronizedBatchNorm2d):
    """Python refuses to make this the class of an existing object."""

    __slots__ = ("more",)


class Whole(nn.Module):
    pass


class Unchangeable(dict):
    def __setitem__(self, key, value):
        raise RuntimeError("no children may be replaced here")


def test_a_class_change_that_fails_after_others_succeeded_reverts_all(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3), Whole(), nn.SyncBatchNorm(3), Odd(3), nn.BatchNorm2d(3))
    before = snapshot(model)

    with (
        register_conversion(Odd, Slotted),
        register_conversion(Whole, lambda module: nn.Sequential(SynchronizedBatchNorm2d(3))),
        pytest.raises(TypeError, match="__class__ assignment"),
    ):
        convert_model(model, eps_mode="clamp", fused=False, process_group=object())

    assert snapshot(model) == before


def test_a_parent_that_refuses_a_child_reverts_all(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3), Whole(), nn.Sequential(Whole()))
    model[2]._modules = Unchangeable(model[2]._modules)
    before = snapshot(model)

    with (
        register_conversion(Whole, lambda module: nn.Identity()),
        pytest.raises(RuntimeError, match="no children"),
    ):
        convert_model(model)

    assert snapshot(model) == before


def test_a_factory_that_raises_comes_before_any_change(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3), Odd(3))
    before = snapshot(model)

    def fail(layer: nn.Module) -> nn.Module:
        raise RuntimeError("cannot")

    with register_conversion(Odd, fail), pytest.raises(RuntimeError, match="cannot"):
        convert_model(model)

    assert snapshot(model) == before


def test_a_factory_that_returns_no_module_is_an_error_that_names_the_layer(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3), Odd(3))
    before = snapshot(model)

    with (
        register_conversion(Odd, lambda layer: None),
        pytest.raises(TypeError, match="registered for Odd to return a module for '1', got None"),
    ):
        convert_model(model)

    assert snapshot(model) == before


def test_an_unknown_eps_mode_is_an_error_before_any_change(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = snapshot(model)

    with pytest.raises(ValueError, match="eps_mode"):
        convert_model(model, eps_mode="minus")

    assert snapshot(model) == before


def test_reverting_is_all_or_nothing_too(snapshot):
    with register_conversion(Whole, lambda module: nn.Identity()):
        model = convert_model(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Whole())))
    model[1]._modules = Unchangeable(model[1]._modules)
    before = snapshot(model)

    with pytest.raises(RuntimeError, match="no children"):
        revert_model(model)

    assert snapshot(model) == before


@pytest.mark.parametrize("function", [convert_model, revert_model])
def test_an_argument_that_is_not_a_module_is_an_error(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: expected an nn\.Module, got \[\]"):
        function([])
