"""Train on handwritten digits three ways, and see what synchronized batch normalization changes.

The same residual network starts three times from the same weights and sees the same batches of 16 images:

- whole batch: on one device, with ``nn.BatchNorm2d``;
- unsynchronized: 8 replicas of 2 images each, every replica normalizing by its own 2 images;
- synchronized: the same replicas after ``convert_model``.

The three runs go forward side by side, so that after every step one can ask how far each has moved away from
the whole batch. They compute in float64. In float32 (``--dtype float32``) two ways of adding the same numbers
differ in the seventh digit, and hundreds of training steps amplify that, whatever did the adding, into a
visible distance. In float64 it stays invisible, and what is seen is the difference between the models.

The images are scikit-learn's, shipped inside the package: 1,797 digits of 8 x 8 pixels.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

REPLICAS = 8
BATCH = 16


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, each followed by batch normalization."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual_net() -> nn.Sequential:
    """Build the classifier: (N, 1, 8, 8) images to (N, 10) scores, with nine batch normalizations."""
    return nn.Sequential(
        ResidualBlock(1, 16, stride=1),
        ResidualBlock(16, 32, stride=2),
        ResidualBlock(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@dataclass
class Run:
    """One way to train, and what it was seen to do."""

    name: str
    model: nn.Module
    replicated: nn.Module  # the model itself, or its replicas
    losses: list[float] = field(default_factory=list)  # per step
    distances: list[float] = field(default_factory=list)  # of the weights from the whole batch's, per step
    accuracies: list[float] = field(default_factory=list)  # on the test images, per epoch

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""
        loss = F.cross_entropy(self.replicated(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        """Measure the share of images that are classified right, by the running statistics."""
        self.model.eval()
        right = self.model(images).argmax(dim=1) == labels
        self.accuracies.append(right.double().mean().item())
        self.model.train()

    def weights(self) -> list[Tensor]:
        """All that is learned by gradients."""
        return list(self.model.parameters())

    def running_statistics(self) -> list[Tensor]:
        """The running mean and variance of every batch normalization."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]


@torch.no_grad()
def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def start_runs(dtype: torch.dtype) -> list[Run]:
    """Give the three runs, whole batch first, the same initial weights."""
    whole = residual_net().to(dtype)
    alone = copy.deepcopy(whole)
    together = convert_model(copy.deepcopy(whole))
    devices = ["cpu"] * REPLICAS
    return [
        Run("whole batch", whole, whole),
        Run("unsynchronized", alone, DataParallelWithCallback(alone, devices)),
        Run("synchronized", together, DataParallelWithCallback(together, devices)),
    ]


def load(dtype: torch.dtype) -> list[Tensor]:
    """Load training images, test images, training labels and test labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=dtype).unsqueeze(1) / 16  # (N, 1, 8, 8), from 0 to 1
    labels = torch.tensor(digits.target)
    return train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)


def batches(count: int, epochs: int) -> Iterator[Tensor]:
    """Yield the indices of every full batch, each epoch in a new order."""
    for _ in range(epochs):
        yield from torch.randperm(count)[: count - count % BATCH].split(BATCH)


def train(runs: list[Run], data: list[Tensor], epochs: int) -> None:
    """Take the runs through the same batches, side by side."""
    train_images, test_images, train_labels, test_labels = data
    whole = runs[0]
    steps_per_epoch = len(train_images) // BATCH
    total = epochs * steps_per_epoch
    progress = tqdm(batches(len(train_images), epochs), total=total, unit="step", mininterval=1)
    for step, batch in enumerate(progress, start=1):
        for run in runs:
            run.step(train_images[batch], train_labels[batch])
            run.distances.append(distance(run.weights(), whole.weights()))
        if step % steps_per_epoch == 0:
            for run in runs:
                run.test(test_images, test_labels)
            progress.set_postfix({run.name: f"{run.accuracies[-1]:.1%}" for run in runs})


def table(runs: list[Run]) -> str:
    """Compare the runs, as Markdown."""
    whole = runs[0]
    lines = [
        "| run | test accuracy | weights: distance from whole batch | running statistics: distance |",
        "|---|---|---|---|",
    ]
    for run in runs:
        weights = distance(run.weights(), whole.weights())
        statistics = distance(run.running_statistics(), whole.running_statistics())
        lines.append(f"| {run.name} | {run.accuracies[-1]:.2%} | {weights:.1e} | {statistics:.1e} |")
    return "\n".join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Draw the loss, the test accuracy and the distance from the whole batch as they went."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    losses, accuracies, distances = figure.subplots(1, 3)
    window = torch.ones(1, 1, 50, dtype=torch.float64) / 50
    styles: tuple[dict[str, Any], ...] = (  # thin on thick, since two of the curves coincide
        {"color": "0.75", "linewidth": 5},
        {"color": "tab:red"},
        {"color": "tab:blue", "linestyle": "--"},
    )
    for run, style in zip(runs, styles, strict=True):
        smooth = F.conv1d(torch.tensor(run.losses, dtype=torch.float64).view(1, 1, -1), window).flatten()
        losses.semilogy(smooth, label=run.name, **style)
        accuracies.plot(range(1, len(run.accuracies) + 1), run.accuracies, **style)
        if run is not runs[0]:
            distances.semilogy(run.distances, **style)
    losses.set(title="training loss (mean of 50 steps)", xlabel="step")
    accuracies.set(title="test accuracy", xlabel="epoch")
    distances.set(title="largest distance of a weight\nfrom the whole-batch run", xlabel="step")
    losses.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images")
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="where the picture goes")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)

    torch.set_num_threads(1)  # 8 x 8 pixels: a second thread would wait more than it computes
    torch.manual_seed(0)
    runs = start_runs(dtype)
    train(runs, load(dtype), arguments.epochs)
    draw(runs, arguments.output)
    print(table(runs))
    print(f"curves: {arguments.output}")


if __name__ == "__main__":
    main()
