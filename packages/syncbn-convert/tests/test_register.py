"""Conversions that users register."""

import copy
import pickle

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model, register_conversion, revert_model
from syncbn_core import SynchronizedBatchNorm2d


class BatchNormReLU(nn.BatchNorm2d):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, input):
        return self.act(super().forward(input))


class SynchronizedBatchNormReLU(BatchNormReLU, SynchronizedBatchNorm2d):
    pass


class ConditionalBatchNorm(nn.Module):
    """Class-conditional: without weights of its own, called with gain and bias."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = layer

    def forward(self, input, gain, bias):
        return self.norm(input) * gain[..., None, None] + bias[..., None, None]


def with_synchronized_norm(module: ConditionalBatchNorm) -> ConditionalBatchNorm:
    norm = SynchronizedBatchNorm2d(module.norm.num_features, affine=False)
    norm._buffers.update(module.norm._buffers)
    return ConditionalBatchNorm(norm)


@pytest.fixture
def conditional():
    with register_conversion(ConditionalBatchNorm, with_synchronized_norm):
        yield ConditionalBatchNorm(nn.BatchNorm2d(3, affine=False))


def test_a_registered_subclass_takes_the_place_of_the_class_and_the_object_stays(snapshot):
    layer = BatchNormReLU(3)
    model = nn.Sequential(layer)
    before = snapshot(model)

    with register_conversion(BatchNormReLU, SynchronizedBatchNormReLU):
        convert_model(model, eps_mode="clamp")

    assert model[0] is layer
    assert type(layer) is SynchronizedBatchNormReLU
    assert layer.eps_mode == "clamp"
    assert model(torch.randn(4, 3, 2, 2)).min() == 0
    assert snapshot(revert_model(model)) == before


def test_a_class_that_is_no_batch_norm_may_be_registered_and_keeps_its_attributes(snapshot):
    class Mine(nn.Sequential):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3))
    model.fused = "mine"
    before = snapshot(model)

    with register_conversion(nn.Sequential, Mine):
        convert_model(model, fused=False)

    assert type(model) is Mine
    assert model.fused == "mine"
    assert "layer_name" not in vars(model)
    assert type(model[0]) is SynchronizedBatchNorm2d
    assert snapshot(revert_model(model)) == before


def test_a_factory_replaces_a_module_under_all_its_names(conditional):
    model = nn.ModuleDict({"a": conditional, "b": nn.ModuleList([conditional])})

    convert_model(model)

    assert model["a"] is model["b"][0] is not conditional
    assert isinstance(model["a"].norm, SynchronizedBatchNorm2d)
    assert type(conditional.norm) is nn.BatchNorm2d


def test_a_replaced_root_is_returned(conditional):
    converted = convert_model(conditional)

    assert isinstance(converted.norm, SynchronizedBatchNorm2d)
    assert revert_model(converted) is conditional


def test_a_replacement_gets_the_mode_the_options_and_its_names_in_the_model(conditional):
    converted = convert_model(nn.Sequential(conditional.eval()), eps_mode="clamp", fused=False)[0]

    assert not converted.training
    assert not converted.norm.training
    assert (converted.norm.eps_mode, converted.norm.fused) == ("clamp", False)
    with pytest.raises(ValueError, match=r"at '0\.norm', got"):
        converted.norm(torch.zeros(1, 4, 2, 2))


def test_the_modes_inside_an_original_that_is_wrapped_stay():
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    original = nn.Linear(2, 2).eval()
    original.part = nn.Dropout()

    with register_conversion(nn.Linear, Outer):
        converted = convert_model(nn.Sequential(original))

    assert not converted[0].training
    assert original.part.training

    revert_model(converted)
    assert original.part.training
    assert not original.training


def test_the_original_comes_back_with_the_tensors_of_today(conditional, snapshot):
    model = nn.Sequential(conditional)
    before = snapshot(model)

    convert_model(model)
    assert snapshot(revert_model(model)) == before

    convert_model(model)
    model[0](torch.randn(4, 3, 2, 2), torch.ones(4, 3), torch.zeros(4, 3))
    model.double().eval()
    learned = model[0].norm.running_mean

    assert revert_model(model)[0] is conditional
    assert conditional.norm.running_mean is learned
    assert not conditional.norm.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_with_replacements_can_be_reverted(conditional, copied):
    model = copied(convert_model(nn.Sequential(conditional)))
    mean = model[0].norm.running_mean

    revert_model(model)

    assert type(model[0].norm) is nn.BatchNorm2d
    assert model[0].norm.running_mean is mean


def test_reverting_what_a_factory_copied_is_an_error_instead_of_a_loss(snapshot):
    with register_conversion(BatchNormReLU, lambda layer: SynchronizedBatchNorm2d(layer.num_features)):
        model = convert_model(nn.Sequential(BatchNormReLU(3)))
    before = snapshot(model)

    with pytest.raises(ValueError, match=r"'0' .*BatchNormReLU.* reuse weight, bias, running_mean"):
        revert_model(model)

    assert snapshot(model) == before


def test_a_factory_that_returns_its_argument_leaves_the_layer_alone_without_a_warning(snapshot):
    model = nn.Sequential(BatchNormReLU(3))
    before = snapshot(model)

    with register_conversion(BatchNormReLU, lambda layer: layer):
        convert_model(model)

    assert snapshot(model) == before


def test_a_registration_holds_until_it_is_removed():
    handle = register_conversion(BatchNormReLU, SynchronizedBatchNormReLU)
    try:
        assert type(convert_model(BatchNormReLU(3))) is SynchronizedBatchNormReLU
    finally:
        handle.remove()

    with pytest.warns(UserWarning, match="alone"):
        assert type(convert_model(BatchNormReLU(3))) is BatchNormReLU


def test_the_latest_registration_wins_over_earlier_ones_and_over_the_built_in():
    class Mine(SynchronizedBatchNorm2d):
        pass

    class Later(Mine):
        pass

    with register_conversion(nn.BatchNorm2d, Mine):
        with register_conversion(nn.BatchNorm2d, Later):
            assert type(convert_model(nn.BatchNorm2d(3))) is Later
        assert type(convert_model(nn.BatchNorm2d(3))) is Mine


def test_a_registration_does_not_apply_to_subclasses():
    class Sub(BatchNormReLU):
        pass

    with (
        register_conversion(BatchNormReLU, SynchronizedBatchNormReLU),
        pytest.warns(UserWarning, match="Sub is a subclass"),
    ):
        convert_model(nn.Sequential(Sub(3)))


@pytest.mark.parametrize("source", ["BatchNorm2d", int, nn.BatchNorm2d(3)])
def test_a_source_that_is_no_module_class_is_an_error(source):
    with pytest.raises(TypeError, match=r"expected a subclass of nn\.Module as source"):
        register_conversion(source, lambda layer: layer)


def test_a_factory_that_cannot_be_called_is_an_error():
    with pytest.raises(TypeError, match="expected a subclass of BatchNormReLU or a callable"):
        register_conversion(BatchNormReLU, "SynchronizedBatchNormReLU")
