"""Networks and training steps, for tests that compare replicas with the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn_parallel import DataParallelWithCallback


class ResidualBlock(nn.Module):
    """Two branches, and a sum with the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv(x)) + self.bn2(x) + x)


def residual_net() -> nn.Module:
    """Build a net of (N, 3, H, W) to (N, 5) in float64, the same one each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        ResidualBlock(8),
        ResidualBlock(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 5),
    ).double()


class SplitAs(DataParallelWithCallback):
    """CPU replicas with given numbers of samples, which may be 0."""

    def __init__(self, module: nn.Module, sizes: list[int]) -> None:
        super().__init__(module, ["cpu"] * len(sizes))
        self.sizes = sizes

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        return list(zip(*(x.split(self.sizes) for x in inputs), strict=True)), [{} for _ in self.sizes]


def weighted_sum(y: Tensor) -> Tensor:
    """Weight every output differently: the gradient of a batch norm's plain sum is zero."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y * weights.to(y)).sum()


def train_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run forward and backward; return the output, the gradients and the buffers, by name."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    weighted_sum(y).backward()
    module = getattr(model, "module", model)
    return {
        "y": y.detach(),
        "dx": x.grad,
        **{f"d {name}": parameter.grad.clone() for name, parameter in module.named_parameters()},
        **{name: buffer.clone() for name, buffer in module.named_buffers()},
    }


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Compare two steps; without a tolerance, by torch's default for the dtype."""
    assert actual.keys() == expected.keys()
    for name in expected:
        prefix = f"{name}: {{}}".format
        torch.testing.assert_close(actual[name], expected[name], msg=prefix, **tolerance)


@pytest.fixture(autouse=True)
def _same_random_numbers_for_every_test() -> None:
    torch.manual_seed(0)


# Test modules cannot import this one, but they can use its fixtures.
def _fixture(helper: Callable[..., Any], name: str) -> Any:
    return pytest.fixture(name=name)(lambda: helper)


_net = _fixture(residual_net, "residual_net")
_split = _fixture(SplitAs, "split_as")
_sum = _fixture(weighted_sum, "weighted_sum")
_step = _fixture(train_step, "train_step")
_close = _fixture(assert_close, "assert_close")
