"""Segment handwritten digits three ways, and see what synchronized batch normalization changes.

Needs: ``pip install scikit-learn matplotlib tqdm``, besides torch, syncbn-convert and syncbn-parallel.

Each scene shows one digit in three handwritings on a piece of a photograph, and the network says for each
pixel which digit it belongs to, if any. Digits and photographs are those that scikit-learn ships. The same
small U-Net starts three times from the same weights and sees the same batches of 8 scenes:

- whole batch: on one device, with ``nn.BatchNorm2d``;
- unsynchronized: 8 replicas of one scene each, and each replica normalizes by its own scene;
- synchronized: the same replicas after ``convert_model``.

All three are evaluated as models are used: without replicas, by their running statistics, on scenes made of
digits and parts of photographs that the training has not seen. The unsynchronized run reaches a training loss
as low as the others, but by the statistics of single scenes, which the evaluation does not have. The runs
compute in float64. In float32 (``--dtype float32``), two ways to add the same numbers differ in the seventh
digit, and hundreds of training steps amplify the difference. In float64, only the difference between the
models is visible.
"""

import argparse
import copy
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits, load_sample_images
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install scikit-learn matplotlib tqdm") from error

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

REPLICAS = 8
BATCH = 8
SIZE = 24  # of a scene, in pixels
DIGITS_PER_SCENE = 3
NO_DIGIT = 10  # the class of all pixels that belong to none
CLASSES = 11
STEPS_PER_EPOCH = 40


class Scenes:
    """Scenes composed of digits and of one strip of each photograph, for training or for the test."""

    def __init__(self, test: bool, dtype: torch.dtype) -> None:
        digits = load_digits()
        mine = torch.arange(len(digits.target)) % 4 == 3
        mine = mine if test else ~mine
        self.ink = torch.tensor(digits.images, dtype=dtype)[mine] / 16  # (N, 8, 8), from 0 to 1
        self.labels = torch.tensor(digits.target)[mine]
        self.photographs = []
        for photograph in load_sample_images().images:  # two, of 427 x 640 pixels
            pixels = torch.tensor(photograph).permute(2, 0, 1).to(dtype) / 255
            self.photographs.append(pixels[..., 480:] if test else pixels[..., :480])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Compose scenes: (count, 3, SIZE, SIZE) images and (count, SIZE, SIZE) classes."""
        images, classes = zip(*(self._scene(generator) for _ in range(count)))
        return torch.stack(images), torch.stack(classes)

    def _scene(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        photograph = self.photographs[below(len(self.photographs))]
        top, left = (below(length - SIZE) for length in photograph.shape[1:])
        image = photograph[:, top : top + SIZE, left : left + SIZE].clone()
        classes = torch.full((SIZE, SIZE), NO_DIGIT)
        kind = torch.where(self.labels == below(10))[0]
        cells = torch.randperm(4, generator=generator)[:DIGITS_PER_SCENE].tolist()
        for cell in cells:  # of a grid of 2 x 2, each 12 x 12 pixels
            which = int(kind[below(len(kind))])
            y, x = (12 * part + below(5) for part in divmod(cell, 2))
            ink = self.ink[which]
            patch = image[:, y : y + 8, x : x + 8]
            color = 0.0 if patch.mean() > 0.5 else 1.0  # black on what is bright, white on what is dark
            patch.copy_(patch * (1 - ink) + color * ink)
            classes[y : y + 8, x : x + 8][ink > 0.3] = self.labels[which]
        return image, classes


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolutions, each followed by batch normalization."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class SmallUNet(nn.Module):
    """Three scales, ten batch normalizations."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1 = block(3, width)
        self.down2 = block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up2 = block(6 * width, 2 * width)
        self.up1 = block(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, CLASSES, H, W) scores; H and W are multiples of 4."""
        fine = self.down1(images)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([middle, F.interpolate(coarse, scale_factor=2.0)], dim=1))
        return self.head(self.up1(torch.cat([fine, F.interpolate(middle, scale_factor=2.0)], dim=1)))


@dataclass
class Run:
    """One way to train, and how it went."""

    name: str
    model: nn.Module
    replicated: nn.Module  # the model itself, or its replicas
    losses: list[float] = field(default_factory=list)  # per step
    distances: list[float] = field(default_factory=list)  # of the weights from the whole batch's, per step
    scores: list[float] = field(default_factory=list)  # mean IoU on the test scenes, per epoch

    def start(self, steps: int) -> None:
        """Prepare for a number of steps."""
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.01, total_steps=steps)

    def step(self, images: Tensor, classes: Tensor) -> None:
        """Train on one batch."""
        scores = self.replicated(images)
        weights = torch.ones(CLASSES, dtype=scores.dtype)
        weights[NO_DIGIT] = 0.3  # most pixels are of no digit
        loss = F.cross_entropy(scores, classes, weights, reduction="sum") / classes.numel()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, images: Tensor, classes: Tensor) -> None:
        """Measure the mean intersection over union of the ten digits, by the running statistics."""
        self.model.eval()
        found = torch.cat([self.model(part).argmax(dim=1) for part in images.split(50)])
        self.model.train()
        ratios = []
        for digit in range(10):
            union = ((found == digit) | (classes == digit)).sum()
            ratios.append(((found == digit) & (classes == digit)).sum() / union)
        self.scores.append(torch.stack(ratios).mean().item())

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
    whole = SmallUNet().to(dtype)
    alone = copy.deepcopy(whole)
    together = convert_model(copy.deepcopy(whole))
    devices = ["cpu"] * REPLICAS
    return [
        Run("whole batch", whole, whole),
        Run("unsynchronized", alone, DataParallelWithCallback(alone, devices)),
        Run("synchronized", together, DataParallelWithCallback(together, devices)),
    ]


def batches(epochs: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the training, the same ones each time."""
    scenes = Scenes(test=False, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs * STEPS_PER_EPOCH):
        yield scenes.draw(BATCH, generator)


def train(runs: list[Run], epochs: int, dtype: torch.dtype) -> None:
    """Take the runs through the same batches, side by side."""
    test_scenes = Scenes(test=True, dtype=dtype).draw(200, torch.Generator().manual_seed(2))
    whole = runs[0]
    # One of the runs does not synchronize on purpose.
    warnings.filterwarnings("ignore", "expected batch-norm layers that synchronize")
    for run in runs:
        run.start(epochs * STEPS_PER_EPOCH)
    progress = tqdm(batches(epochs, dtype), total=epochs * STEPS_PER_EPOCH, unit="step", mininterval=1)
    for step, batch in enumerate(progress, start=1):
        for run in runs:
            run.step(*batch)
            run.distances.append(distance(run.weights(), whole.weights()))
        if step % STEPS_PER_EPOCH == 0:
            for run in runs:
                run.test(*test_scenes)
            progress.set_postfix({run.name: f"{run.scores[-1]:.1%}" for run in runs})


def table(runs: list[Run]) -> str:
    """Compare the runs, as Markdown."""
    whole = runs[0]
    lines = [
        "| run | training loss | test mIoU | distance of the weights | of the running statistics |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        weights = distance(run.weights(), whole.weights())
        statistics = distance(run.running_statistics(), whole.running_statistics())
        loss = sum(run.losses[-STEPS_PER_EPOCH:]) / STEPS_PER_EPOCH
        figures = f"{loss:.3f} | {run.scores[-1]:.1%} | {weights:.0e} | {statistics:.0e}"
        lines.append(f"| {run.name} | {figures} |")
    return "\n".join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Draw the learning curves, and what the models see in some scenes."""
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[6, 5])
    losses, scores = left.subplots(1, 2)
    styles: tuple[dict[str, Any], ...] = (  # thin on thick, since two of the curves coincide
        {"color": "0.75", "linewidth": 7},
        {"color": "tab:red", "linewidth": 2},
        {"color": "tab:blue", "linewidth": 2, "linestyle": "--"},
    )
    for run, style in zip(runs, styles, strict=True):
        epochs = range(1, len(run.scores) + 1)
        means = torch.tensor(run.losses).view(len(epochs), -1).mean(dim=1)
        losses.plot(epochs, means, label=run.name, **style)
        scores.plot(epochs, run.scores, **style)
    losses.set(title="training loss", xlabel="epoch", ylim=(0, None))
    scores.set(title="mean IoU, test scenes", xlabel="epoch", ylim=(0, 1))
    losses.legend(frameon=False)
    for axes in (losses, scores):
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    _draw_scenes(right, runs)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def _draw_scenes(figure: Any, runs: list[Run]) -> None:
    dtype = runs[0].weights()[0].dtype
    images, classes = Scenes(test=True, dtype=dtype).draw(3, torch.Generator().manual_seed(3))
    columns = [("scene", images.permute(0, 2, 3, 1)), ("truth", classes)]
    for run in runs:
        name = {"whole batch": "whole\nbatch", "unsynchronized": "unsyn-\nchronized"}.get(
            run.name, "syn-\nchronized"
        )
        columns.append((name, run.model.eval()(images).argmax(dim=1)))
        run.model.train()
    grid = figure.subplots(3, len(columns))
    for column, (name, pictures) in enumerate(columns):
        grid[0, column].set_title(name, fontsize=9)
        for axes, picture in zip(grid[:, column], pictures):
            shown = picture if picture.ndim == 3 else picture.double().where(picture != NO_DIGIT, torch.nan)
            axes.imshow(shown.numpy(), cmap="tab10", vmin=0, vmax=9)
            axes.set(xticks=[], yticks=[])


def main() -> None:
    """Train, print the table, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=22, help=f"of {STEPS_PER_EPOCH} batches each")
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="where the picture goes")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)

    torch.set_num_threads(1)  # 32 x 32 pixels: a second thread would wait more than it computes
    torch.manual_seed(0)
    runs = start_runs(dtype)
    train(runs, arguments.epochs, dtype)
    draw(runs, arguments.output)
    print(table(runs))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(f"curves: {arguments.output}")


if __name__ == "__main__":
    main()
