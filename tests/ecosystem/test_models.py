"""Models that people use: converted, on four replicas, they are the whole batch; reverted, what they were."""

import copy
from collections.abc import Callable

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from monai.data import MetaTensor
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

from syncbn_convert import convert_model
from syncbn_core import SynchronizedBatchNorm3d
from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 1e-12, "atol": 1e-12}

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


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_a_converted_model_on_four_replicas_is_the_whole_batch(library, name, assert_is_the_whole_batch):
    assert_is_the_whole_batch("models", library, name, *MODELS[library, name])


def images_of_monai(count: int) -> MetaTensor:
    """Images as MONAI's transforms make them: a subclass of Tensor that carries where it came from."""
    x = torch.randn(count, 1, 16, 16, 16, dtype=torch.float64)
    return MetaTensor(x, meta={"spacing": [1.0, 1.0, 2.5]})


def test_replicas_take_metatensors_and_give_the_numbers_of_the_whole_batch(weighted_sum):
    factory, _ = MODELS["monai", "UNet, 3-D"]
    torch.manual_seed(0)
    original = factory().double()
    replicas = DataParallelWithCallback(convert_model(copy.deepcopy(original)), ["cpu"] * 4)
    x = images_of_monai(7)

    expected, ours = original(x.as_tensor()), replicas(x)
    weighted_sum(expected).backward()
    weighted_sum(torch.as_tensor(ours)).backward()

    torch.testing.assert_close(torch.Tensor.as_subclass(ours, Tensor), expected, **EXACT)
    for mine, theirs in zip(replicas.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_a_single_layer_gives_a_metatensor_where_torchs_layer_does():
    x = images_of_monai(4)
    layer, theirs = SynchronizedBatchNorm3d(1).double(), nn.BatchNorm3d(1).double()
    replicas = DataParallelWithCallback(nn.Sequential(layer, nn.ReLU(inplace=True)), ["cpu"] * 2)

    assert type(layer(x)) is type(theirs(x))
    assert replicas(x).shape == x.shape


def test_a_frozen_layer_stays_as_it_is_with_a_warning(contents):
    model = nn.Sequential(DetrFrozenBatchNorm2d(8))
    held = contents(model)

    with pytest.warns(UserWarning, match="'0': DetrFrozenBatchNorm2d keeps running statistics"):
        convert_model(model)

    assert contents(model) == held
