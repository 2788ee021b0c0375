"""Segment handwritten digits in several processes, and see that they are one batch.

Needs: ``pip install scikit-learn matplotlib tqdm``, besides torch, syncbn-convert and syncbn-parallel.

The training of ``digits.py`` under ``torchrun``. Each process gets its share of each batch of 8 scenes:

- whole batch: on one device, with ``nn.BatchNorm2d``;
- unsynchronized: ``DistributedDataParallel``, and each process normalizes by its own share;
- synchronized: the same after ``convert_model``;
- replicas too: the same, with two replicas in each process.

Start it with ``torchrun --nproc-per-node 2 examples/digits_ddp.py``. Without torchrun, it starts the same two
processes itself. The program fails if the weights of the last two runs differ from those of the whole batch
by more than 1e-8.
"""

import argparse
import copy
import io
import os
import sys
from contextlib import nullcontext, redirect_stderr

import digits
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.run import main as torchrun
from torch.nn.parallel import DistributedDataParallel

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

REPLICAS = 2
TOLERANCE = 1e-8


class RunInProcesses(digits.Run):
    """A run whose batches are shared among the processes."""

    def step(self, images: Tensor, classes: Tensor) -> None:
        """Train on this process's share of one batch."""
        size, rank = dist.get_world_size(), dist.get_rank()
        super().step(images.tensor_split(size)[rank], classes.tensor_split(size)[rank])


def start_runs() -> list[digits.Run]:
    """Give all runs, whole batch first, the same initial weights."""
    whole = digits.SmallUNet().double()
    alone = copy.deepcopy(whole)
    together = convert_model(copy.deepcopy(whole))
    both = convert_model(copy.deepcopy(whole))
    replicas = DataParallelWithCallback(both, ["cpu"] * REPLICAS)
    return [
        digits.Run("whole batch", whole, whole),
        RunInProcesses("unsynchronized", alone, DistributedDataParallel(alone)),
        RunInProcesses("synchronized", together, DistributedDataParallel(together)),
        RunInProcesses("replicas too", both, DistributedDataParallel(replicas)),
    ]


def main() -> None:
    """Train, print the table, check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2, help=f"of {digits.STEPS_PER_EPOCH} batches each")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    if digits.BATCH % size:
        raise SystemExit(f"expected a number of processes that divides {digits.BATCH}, got {size}")
    torch.manual_seed(0)
    runs = start_runs()
    with nullcontext() if rank == 0 else redirect_stderr(io.StringIO()):  # one progress bar is enough
        digits.train(runs, arguments.epochs, torch.float64)
    distances = [digits.distance(run.weights(), runs[0].weights()) for run in runs[2:]]
    if rank == 0:
        print(digits.table(runs))
        print(f"{size} processes; synchronized, they differ from the whole batch by {max(distances):.1e}")
    dist.destroy_process_group()
    if max(distances) > TOLERANCE:
        raise SystemExit(f"expected at most {TOLERANCE:.0e}, got {max(distances):.1e}")


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        torchrun(["--standalone", "--nproc-per-node", "2", __file__, *sys.argv[1:]])
