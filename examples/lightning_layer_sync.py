"""Lightning, which wraps the model in DistributedDataParallel: a layer-sync plugin converts the model before.

Needs: ``pip install pytorch-lightning``, besides torch and syncbn-convert.

The batch norm layers of two processes use both halves of each batch. The program prints how far the weights
are from those of one process that trains on the whole batches. ``Classifier(convert_model(net))`` without the
plugin does the same.
"""

import copy
import logging
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

try:
    import pytorch_lightning
    from pytorch_lightning.plugins.layer_sync import LayerSync
    from pytorch_lightning.strategies import DDPStrategy
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install pytorch-lightning") from error

from syncbn_convert import convert_model, revert_model


class SynchronizeBatchNorm(LayerSync):
    """Have Lightning convert the model before it wraps it, and take that back after the training."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the model, in every process."""
        return convert_model(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Take the conversion back."""
        return revert_model(model)


class Classifier(pytorch_lightning.LightningModule):
    """Five classes of small images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of one batch, of half a batch in each of two processes."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(net: nn.Module, data: TensorDataset, processes: int) -> nn.Module:
    """Train a copy of the net for one epoch, on the same batches of 8 with any number of processes."""
    model = Classifier(copy.deepcopy(net))
    trainer = pytorch_lightning.Trainer(
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
        plugins=[SynchronizeBatchNorm()],
        accelerator="cpu",
        devices=processes,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=8 // processes))
    return model.net


def main() -> None:
    """Train by one process and by two, and say how far apart the two models are."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's advice about the number of workers, and the like
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 3, 8, 8, dtype=torch.float64), torch.randint(5, (64,)))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).double()
    one, two = (train(net, data, processes) for processes in (1, 2))
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    distance = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"after {len(data) // 8} steps, two processes are this far from the whole batch: {distance:.0e}")


if __name__ == "__main__":
    main()
