"""Three ways in which replicas fail, and the errors that users get at once: which replica, where, and why.

Needs: torch, syncbn-convert and syncbn-parallel, and nothing else.

In each case, one of four replicas gets black images and therefore does something else than the others. The
others wait for it in a batch normalization. Without these errors they would wait forever.
"""

import traceback

import torch
from torch import Tensor, nn

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

BLACK_REPLICA = 2


def is_black(images: Tensor) -> bool:
    """Tell whether all pixels are 0."""
    return bool(images.amax() == 0)


class TwoNorms(nn.Module):
    """The layers of the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(3)
        self.norm2 = nn.BatchNorm2d(3)


class Raises(TwoNorms):
    """A model that raises an error for some images."""

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to the same shape."""
        features = self.norm1(images)
        if is_black(images):
            raise ValueError("these images are black")
        return self.norm2(features)


class Skips(TwoNorms):
    """A model with a branch on the data, such as a detection head that had no proposals."""

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to the same shape."""
        features = self.norm1(images)
        return features if is_black(images) else self.norm2(features)


class Swaps(TwoNorms):
    """A model that calls its layers in an order that depends on the data."""

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to the same shape."""
        if is_black(images):
            return self.norm1(self.norm2(images))
        return self.norm2(self.norm1(images))


def show(kind: type[TwoNorms]) -> None:
    """Let one replica fail, print the error that the user gets, and continue training."""
    model = DataParallelWithCallback(convert_model(kind()), device_ids=["cpu"] * 4)
    images = torch.rand(8, 3, 4, 4)
    images_with_black = images.clone()
    images_with_black.chunk(4)[BLACK_REPLICA].zero_()

    print(f"--- {kind.__name__}: replica {BLACK_REPLICA} (of 0 to 3) gets black images")
    try:
        model(images_with_black)
    except Exception as error:
        print("".join(traceback.format_exception_only(error)), end="")
    model(images).square().sum().backward()
    print("and the next step works\n")


def main() -> None:
    """Show the three failures."""
    torch.manual_seed(0)
    for kind in (Raises, Skips, Swaps):
        show(kind)


if __name__ == "__main__":
    main()
