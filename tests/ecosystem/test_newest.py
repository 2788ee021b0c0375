"""Models of torchvision and timm, on the newest torch: on four replicas they are the whole batch."""

import functools
import warnings

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

IMAGES = (7, 3, 64, 64)  # 2, 2, 2 and 1 for four replicas


class Backbone(nn.Module):
    """The backbone and the feature pyramid of a detection model: what of it holds batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d
        )
        self.head = nn.BatchNorm2d(256)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)["0"])


def of_torchvision(name, **options):
    return functools.partial(torchvision.models.get_model, name, weights=None, **options)


def of_timm(name, **options):
    return functools.partial(timm.create_model, name, pretrained=False, drop_rate=0.0, **options)


def deeplab() -> nn.Module:
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    return without_dropout(model)


def mobilenet() -> nn.Module:
    return without_dropout(torchvision.models.mobilenet_v3_small(weights=None))


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MODELS = {
    ("torchvision", "ResNet-18"): (of_torchvision("resnet18"), IMAGES),
    ("torchvision", "MobileNetV3, small"): (mobilenet, IMAGES),
    ("torchvision", "DeepLabV3, ResNet-50"): (deeplab, IMAGES),
    ("timm", "EfficientNet-B0"): (of_timm("efficientnet_b0", drop_path_rate=0.0), IMAGES),
    ("timm", "RegNetY-002"): (of_timm("regnety_002"), IMAGES),
    ("timm", "ResNetV2-50, batch norm"): (of_timm("resnetv2_50"), IMAGES),
    ("timm", "Inception-v4 (BatchNormAct2d)"): (of_timm("inception_v4"), (7, 3, 96, 96)),
}


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_a_converted_model_on_four_replicas_is_the_whole_batch(library, name, assert_is_the_whole_batch):
    assert_is_the_whole_batch("newest", library, name, *MODELS[library, name])


def test_a_detection_model_keeps_its_frozen_layers_and_synchronizes_the_others(assert_is_the_whole_batch):
    frozen = sum(isinstance(m, torchvision.ops.FrozenBatchNorm2d) for m in Backbone().modules())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "convert_model left")  # it lists the frozen layers
        assert_is_the_whole_batch(
            "newest",
            "torchvision",
            "Faster R-CNN's backbone, frozen, and a head",
            Backbone,
            IMAGES,
            skipped=frozen,
        )


def test_the_layers_of_timm_convert_out_of_the_box(recwarn):
    from syncbn_convert import convert_model, inspect_model

    model = convert_model(timm.create_model("efficientnet_b0", pretrained=False))

    assert not recwarn.list
    assert not inspect_model(model).skipped
    assert all(isinstance(m, nn.BatchNorm2d) for m in model.modules() if hasattr(m, "running_mean"))
    assert torch.isfinite(model(torch.randn(2, 3, 64, 64))).all()
