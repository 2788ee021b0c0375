"""Layers without a conversion stay as they are, and one warning names them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from syncbn_convert import convert_model
from syncbn_core import SynchronizedBatchNorm2d


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class FrozenBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", nn.Identity())


def with_forward_of_its_own() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = layer.forward
    return layer


def with_attribute(name: str, value: object) -> nn.Module:
    layer = nn.BatchNorm2d(3)
    setattr(layer, name, value)
    return layer


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: lazy modules are new
        return nn.LazyBatchNorm2d()


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated  # torch's own, of late
        return torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))


def scripted_by_itself() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(nn.BatchNorm2d(3, track_running_stats=False))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.trace(nn.Sequential(nn.BatchNorm2d(3)).eval(), torch.zeros(1, 3, 2, 2))


def fused() -> nn.Module:
    return torch.ao.nn.intrinsic.ConvBn2d(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


def quantization_aware() -> nn.Module:
    return torch.ao.nn.intrinsic.qat.ConvBn2d(3, 3, 1, qconfig=torch.ao.quantization.default_qat_qconfig)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: BatchNormReLU(3), "odd", "BatchNormReLU is a subclass of BatchNorm2d"),
        (lambda: FrozenBatchNorm(), "odd", "FrozenBatchNorm keeps running statistics"),
        (lazy, "odd", "LazyBatchNorm2d has no features yet"),
        (parametrized, "odd", "parametrized"),
        (with_forward_of_its_own, "odd", "a forward that is set on the object"),
        (lambda: with_attribute("fused", False), "odd", "an attribute 'fused', which"),
        (lambda: with_attribute("qconfig", object()), "odd", "qconfig"),
        (scripted, "odd.0", "part of a TorchScript module"),
        (scripted_by_itself, "odd", "BatchNorm2d in TorchScript"),
        (traced, "odd.0", "part of a TorchScript module"),
        (fused, "odd.1", "part of the quantized or fused ConvBn2d"),
        (quantization_aware, "odd.bn", "part of the quantized or fused ConvBn2d"),
    ],
)
def test_an_odd_kind_of_batch_norm_is_left_alone_with_a_warning_that_says_why(make, name, reason, snapshot):
    odd = make()
    model = nn.ModuleDict({"odd": odd, "plain": nn.BatchNorm2d(3)})
    before = snapshot(odd)

    with pytest.warns(UserWarning, match=rf"left 1 batch norm layer(?s:.*)'{name}': .*{reason}"):
        convert_model(model)

    assert model["odd"] is odd
    assert snapshot(odd) == before
    assert type(model["plain"]) is SynchronizedBatchNorm2d


def test_one_warning_lists_all_and_tells_what_to_do_at_the_line_of_the_call():
    model = nn.Sequential(BatchNormReLU(3), nn.Sequential(FrozenBatchNorm()))

    with pytest.warns(UserWarning, match="alone") as caught:
        convert_model(model)

    (warning,) = caught
    text = str(warning.message)
    assert all(part in text for part in ("left 2", "'0'", "'1.0'", "register_conversion", "skip="))
    assert warning.filename == __file__


def test_if_warnings_are_errors_the_model_is_as_it_was(snapshot):
    model = nn.Sequential(nn.BatchNorm2d(3), BatchNormReLU(3))
    before = snapshot(model)

    with pytest.raises(UserWarning, match="alone"):
        convert_model(model)

    assert snapshot(model) == before


def test_a_subclass_of_a_synchronized_layer_needs_no_conversion_and_no_warning():
    class Mine(SynchronizedBatchNorm2d):
        pass

    assert type(convert_model(nn.Sequential(Mine(3)))[0]) is Mine


class Wrapped(nn.parallel.DistributedDataParallel):
    """One that needs no process group: only its class matters here."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(m)])
def test_a_model_wrapped_for_distributed_training_is_an_error_that_tells_the_order(around, snapshot):
    model = around(Wrapped(nn.Sequential(nn.BatchNorm2d(3))))
    before = snapshot(model)

    with pytest.raises(ValueError, match=r"DistributedDataParallel\(convert_model\(model\)\)"):
        convert_model(model)

    assert snapshot(model) == before


def test_a_model_converted_before_it_was_wrapped_is_no_error():
    convert_model(Wrapped(convert_model(nn.Sequential(nn.BatchNorm2d(3)))))


def test_an_odd_layer_in_a_wrapped_model_is_left_alone_like_any_other():
    with pytest.warns(UserWarning, match=r"'module\.0': BatchNormReLU is a subclass"):
        convert_model(Wrapped(nn.Sequential(BatchNormReLU(3))))
