"""Leaving out what somebody names."""

import pytest
from torch import nn

from syncbn_convert import convert_model
from syncbn_core import SynchronizedBatchNorm2d


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(8)),
            "decoder": nn.Sequential(nn.BatchNorm2d(3)),
        }
    )


def synchronized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SynchronizedBatchNorm2d)]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), ["encoder.0", "encoder.1", "decoder.0"]),
        ("decoder", ["encoder.0", "encoder.1"]),
        (["decoder.0"], ["encoder.0", "encoder.1"]),
        ("*.0", ["encoder.1"]),
        (["encoder.[01]", "dec*"], []),
        (lambda name, module: getattr(module, "num_features", 0) > 3, ["encoder.0", "decoder.0"]),
        (iter(["encoder", lambda name, module: name == "decoder.0"]), []),
        ("", []),
    ],
)
def test_matching_modules_and_their_contents_are_left_alone_without_a_warning(model, skip, left):
    assert synchronized(convert_model(model, skip=skip)) == left


def test_a_shared_layer_is_skipped_under_any_of_its_names(model):
    model["head"] = nn.Sequential(model["encoder"][0])

    convert_model(model, skip="head.0")

    assert synchronized(model) == ["encoder.1", "decoder.0"]


def test_no_warning_is_given_about_an_odd_layer_that_is_skipped():
    class Odd(nn.BatchNorm2d):
        pass

    convert_model(nn.Sequential(Odd(3)), skip=lambda name, module: isinstance(module, Odd))


def test_a_pattern_that_matches_nothing_is_an_error(model, snapshot):
    before = snapshot(model)

    with pytest.raises(ValueError, match=r"'decodr\.\*', which matches no module"):
        convert_model(model, skip=["encoder", "decodr.*"])

    assert snapshot(model) == before


@pytest.mark.parametrize("rule", [3, nn.BatchNorm2d, nn.BatchNorm2d(3)])
def test_a_rule_that_is_neither_a_pattern_nor_a_predicate_is_an_error(model, rule):
    with pytest.raises(TypeError, match="expected names, patterns and predicates"):
        convert_model(model, skip=[rule])
