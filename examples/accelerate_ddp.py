"""accelerate, which wraps the model in DistributedDataParallel: convert the model before ``prepare``.

Needs: ``pip install accelerate``, besides torch and syncbn-convert.

Start it with ``torchrun --nproc-per-node 2 examples/accelerate_ddp.py``. Without torchrun, it starts the same
two processes itself. Each process trains on its half of each batch. The program prints how far the weights
are from those of a training on the whole batches.
"""

import copy
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.run import main as torchrun
from torch.utils.data import DataLoader, TensorDataset

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install accelerate") from error

from syncbn_convert import convert_model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(model: nn.Module, data: TensorDataset, accelerator: Accelerator) -> None:
    """Train for one epoch; each process gets its share of each batch of 8."""
    loader = DataLoader(data, batch_size=8 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(convert_model(model), optimizer_of(model), loader)
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()


def train_whole_batch(model: nn.Module, data: TensorDataset) -> None:
    """Train for one epoch on the whole batches, in one process."""
    optimizer = optimizer_of(model)
    for images, labels in DataLoader(data, batch_size=8):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def main() -> None:
    """Train both ways, and say how far apart the two models are."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 3, 8, 8, dtype=torch.float64), torch.randint(5, (64,)))
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).double()
    whole = copy.deepcopy(model)
    train(model, data, accelerator)
    train_whole_batch(whole, data)
    pairs: zip[tuple[Tensor, Tensor]] = zip(whole.state_dict().values(), model.state_dict().values())
    distance = max(float((a - b).abs().max()) for a, b in pairs)
    accelerator.print(f"after 8 steps, the processes are this far from the whole batch: {distance:.0e}")
    accelerator.end_training()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        torchrun(["--standalone", "--nproc-per-node", "2", __file__])
