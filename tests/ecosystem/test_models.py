"""Models that people use: converted, on four replicas, they are the whole batch; reverted, what they were."""

import copy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from monai.networks.nets import DenseNet121, UNet
from resnest.torch.resnet import Bottleneck
from resnest.torch.resnet import ResNet as ResNeSt
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from syncbn_convert import convert_model, inspect_model, revert_model
from syncbn_parallel import DataParallelWithCallback

# Dropout and stochastic depth draw other numbers in every replica than for the whole batch: they are off.
MOBILENET = MobileNetV2Config(depth_multiplier=0.5, classifier_dropout_prob=0.0)
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], out_features=STAGES
)
SEGFORMER = SegformerConfig(
    hidden_sizes=[8, 16, 24, 32],
    decoder_hidden_size=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout_prob=0.0,
    drop_path_rate=0.0,
)
UPERNET = UperNetConfig(
    backbone_config=RESNET, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=24
)
IMAGES = (7, 3, 64, 64)  # 2, 2, 2 and 1 for four replicas

MODELS: dict[tuple[str, str], tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    ("monai", "UNet, 3-D"): (
        lambda: UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2, norm="batch"),
        (7, 1, 16, 16, 16),
    ),
    ("monai", "DenseNet121, 3-D"): (
        lambda: DenseNet121(3, 1, 2, init_features=8, growth_rate=4),
        (7, 1, 32, 32, 32),
    ),
    ("transformers", "ResNet"): (lambda: ResNetForImageClassification(RESNET), IMAGES),
    ("transformers", "MobileNetV2"): (lambda: MobileNetV2ForImageClassification(MOBILENET), IMAGES),
    ("transformers", "MobileNetV2 + DeepLabV3+"): (
        lambda: MobileNetV2ForSemanticSegmentation(MOBILENET),
        IMAGES,
    ),
    ("transformers", "SegFormer"): (lambda: SegformerForSemanticSegmentation(SEGFORMER), IMAGES),
    ("transformers", "UperNet"): (lambda: UperNetForSemanticSegmentation(UPERNET), IMAGES),
    ("efficientnet_pytorch", "EfficientNet-B0"): (
        lambda: EfficientNet.from_name("efficientnet-b0", dropout_rate=0.0, drop_connect_rate=0.0),
        IMAGES,
    ),
    ("resnest", "ResNeSt, one block per stage"): (
        lambda: ResNeSt(Bottleneck, [1, 1, 1, 1], radix=2, deep_stem=True, avg_down=True, avd=True),
        IMAGES,
    ),
}


def build(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().double()


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors(item)


def train_step(model: nn.Module, x: Tensor, weighted_sum: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """Run forward and backward; return the outputs, the gradients and the running statistics."""
    outputs = list(tensors(model(x)))
    sum(map(weighted_sum, outputs)).backward()
    module = getattr(model, "module", model)
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in module.parameters()]
    return [[y.detach() for y in outputs], gradients, list(module.buffers())]


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any number, relative to the largest in its tensor where that is above 1."""
    return max(
        float((a - e).abs().max() / e.abs().max().clamp(min=1.0))
        for a, e in zip(actual, expected, strict=True)
    )


def without_synchronization(
    model: nn.Module, x: Tensor, weighted_sum: Callable[[Tensor], Tensor], expected: list[Tensor]
) -> str:
    """What the same replicas make of the model as it is: how far the output is off, if there is one."""
    try:
        outputs = train_step(DataParallelWithCallback(model, ["cpu"] * 4), x, weighted_sum)[0]
    except ValueError:  # the replica with one sample of one pixel: "Expected more than 1 value per channel"
        return "ValueError"
    return f"{distance(outputs, expected):.0e}"


def contents(model: nn.Module) -> list[Any]:
    """Every module under every name: its identity, its class, and what it holds, by identity, in order."""
    return [
        (name, id(module), type(module), [(key, id(value)) for key, value in vars(module).items()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_a_converted_model_on_four_replicas_is_the_whole_batch(library, name, tables, weighted_sum):
    factory, shape = MODELS[library, name]
    x = torch.randn(shape, dtype=torch.float64)
    original = build(factory)
    model, untouched = copy.deepcopy(original), copy.deepcopy(original)
    held = contents(model)

    convert_model(model)
    report = inspect_model(model)
    print(f"\n{library}: {name}", report, sep="\n")
    assert not report.skipped

    replicas = DataParallelWithCallback(model, ["cpu"] * 4)
    expected = train_step(original, x, weighted_sum)
    distances = list(map(distance, train_step(replicas, x, weighted_sum), expected))
    assert max(distances) < 1e-9

    revert_model(model)
    assert contents(model) == held
    model.load_state_dict(untouched.state_dict())
    reverted, unconverted = (list(tensors(m.eval()(x))) for m in (model, untouched))
    assert all(map(torch.equal, reverted, unconverted))

    apart = without_synchronization(untouched.train(), x, weighted_sum, expected[0])
    tables.add(
        "models",
        f"{library} {version(library)}",
        name,
        len(report.converted),
        *(f"{d:.0e}" for d in distances),
        apart,
    )


def test_a_frozen_layer_stays_as_it_is_with_a_warning():
    model = nn.Sequential(DetrFrozenBatchNorm2d(8))
    held = contents(model)

    with pytest.warns(UserWarning, match="'0': DetrFrozenBatchNorm2d keeps running statistics"):
        convert_model(model)

    assert contents(model) == held
