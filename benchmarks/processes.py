"""What synchronization over processes costs: one layer, forward and backward, on gloo.

Each process runs the variants side by side and in turns, on its own batch:

- unsynchronized: torch's ``nn.BatchNorm2d``;
- ours: ``SynchronizedBatchNorm2d``;
- torch's, on GPUs alone: ``nn.SyncBatchNorm``;
- plain ops: ordinary differentiable operations, with a differentiable all_reduce of the mean and of the mean
  of squares, as most implementations for the CPU do it;
- floor: nothing but an all_gather of 2C + 1 numbers and an all_reduce of 2C, the bytes that any layer needs.

It also measures how to add up 2C numbers of every process: by an all_gather and a local sum, or by an
all_reduce; and what a collective of few numbers costs as processes grow.

The processes are started here, as many as ``--processes`` says, one thread each. With ``--device cuda`` they
communicate over NCCL. Where there are fewer GPUs than processes, they share the GPUs, and communicate by
sockets as if each were a host of its own.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from side_by_side import wait_for
from torch import Tensor, nn

from syncbn_core import SynchronizedBatchNorm2d

SHAPES = [(16, 64, 56, 56), (8, 256, 28, 28), (4, 512, 7, 7), (2, 64, 8, 8)]  # of one process
CHANNELS = [64, 256, 512]
RESULTS = Path(__file__).parent / "results"
Times = dict[str, float]  # median seconds of every variant


class SumOverProcesses(torch.autograd.Function):
    """A differentiable all_reduce: its adjoint is another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Add up what the processes have."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Add up their gradients."""
        return SumOverProcesses.apply(grad)


class PlainOps(nn.BatchNorm2d):
    """Synchronized batch norm of ordinary operations, for equal batches."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the mean and the mean of squares over all processes."""
        means = torch.stack([x.mean((0, 2, 3)), (x * x).mean((0, 2, 3))])
        mean, mean_of_squares = SumOverProcesses.apply(means) / dist.get_world_size()
        var = mean_of_squares - mean * mean
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def step_of(layer: nn.Module, shape: tuple[int, ...], device: str) -> Callable[[], None]:
    """One forward and backward of a layer."""
    layer = layer.to(device)
    x, dy = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)

    def step() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    return step


def gathering(numbers: int, device: str) -> Callable[[], None]:
    """One all_gather and a local sum."""
    mine = torch.randn(numbers, dtype=torch.float64, device=device)
    everybody = mine.new_empty(dist.get_world_size(), numbers)

    def gather() -> None:
        dist.all_gather(list(everybody.unbind()), mine)
        everybody.sum(0)

    return gather


def reducing(numbers: int, device: str) -> Callable[[], None]:
    """One all_reduce."""
    mine = torch.randn(numbers, dtype=torch.float64, device=device)
    return lambda: dist.all_reduce(mine.clone())


def measure(variants: dict[str, Callable[[], None]], seconds: float, device: str) -> Times:
    """Run the variants in turns for about so long; the medians."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        for _ in range(3):
            variant()
    started = time.perf_counter()
    go_on = torch.ones(1, device=device)
    while go_on.item():
        for name, variant in variants.items():
            dist.barrier()
            wait_for(device)
            before = time.perf_counter()
            variant()
            wait_for(device)
            times[name].append(time.perf_counter() - before)
        go_on.fill_(float(time.perf_counter() - started < seconds or len(times[name]) < 10))
        dist.broadcast(go_on, 0)
    return {name: statistics.median(each) for name, each in times.items()}


def take_gpu(rank: int, world_size: int) -> None:
    """Give this process a GPU, and a host's name of its own where it shares the GPU, as NCCL requires."""
    count = torch.cuda.device_count()
    torch.cuda.set_device(rank % count)
    if world_size > count:
        os.environ.update(NCCL_HOSTID=f"host-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")


def measure_all(rank: int, world_size: int, seconds: float, folder: str, device: str) -> None:
    """Measure everything in one of the processes; process 0 writes it down."""
    torch.set_num_threads(1)
    if device == "cuda":
        take_gpu(rank, world_size)
    backend = "gloo" if device == "cpu" else "nccl"
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    layers: dict[tuple[int, ...], Times] = {}
    for shape in SHAPES:
        channels = shape[1]
        gather, reduce = gathering(2 * channels + 1, device), reducing(2 * channels, device)
        variants = {
            "unsynchronized": step_of(nn.BatchNorm2d(channels), shape, device),
            "ours": step_of(SynchronizedBatchNorm2d(channels), shape, device),
            **({} if device == "cpu" else {"torch's": step_of(nn.SyncBatchNorm(channels), shape, device)}),
            "plain ops": step_of(PlainOps(channels), shape, device),
            "floor": lambda gather=gather, reduce=reduce: (gather(), reduce()),
        }
        layers[shape] = measure(variants, seconds, device)
    sums: dict[int, Times] = {}
    for channels in CHANNELS:
        gather, reduce = gathering(2 * channels, device), reducing(2 * channels, device)
        sums[channels] = measure({"gather": gather, "reduce": reduce}, seconds, device)
    if rank == 0:
        torch.save((layers, sums), f"{folder}/results")
    dist.destroy_process_group()


def run(
    world_size: int, seconds: float, device: str
) -> tuple[dict[tuple[int, ...], Times], dict[int, Times]]:
    """Measure with so many processes."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure_all, (world_size, seconds, folder, device), nprocs=world_size)
        return torch.load(f"{folder}/results", weights_only=False)


def layer_table(results: dict[tuple[int, ...], Times]) -> list[str]:
    """Compare the layers, in microseconds."""
    names = list(next(iter(results.values())))
    others = [name for name in names if name not in ("unsynchronized", "ours", "floor")]
    header = ["batch of a process", *names, *(f"{name} / ours" for name in others), "overhead / floor"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for shape, times in results.items():
        ours = times["ours"]
        cells = [f"{1e6 * times[name]:,.0f}" for name in names]
        ratios = [*(times[name] / ours for name in others), (ours - times["unsynchronized"]) / times["floor"]]
        lines.append(f"| {' | '.join([str(shape), *cells, *(f'{ratio:.1f}' for ratio in ratios)])} |")
    return lines


def sum_table(results: dict[int, dict[int, Times]]) -> list[str]:
    """Compare the two ways of adding up, in microseconds, by processes and channels."""
    lines = ["| processes | channels | all_gather and sum | all_reduce |", "|---|---|---|---|"]
    for world_size, sums in results.items():
        for channels, times in sums.items():
            gather, reduce = 1e6 * times["gather"], 1e6 * times["reduce"]
            lines.append(f"| {world_size} | {channels} | {gather:,.0f} | {reduce:,.0f} |")
    return lines


def draw(results: dict[int, dict[tuple[int, ...], Times]], path: Path) -> None:
    """Draw each variant's time by the shape, one picture for each number of processes."""
    figure = Figure(figsize=(4.5 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (world_size, layers) in zip(panels, results.items(), strict=True):
        names = list(next(iter(layers.values())))
        width = 0.8 / len(names)
        for offset, name in enumerate(names):
            places = [place + width * (offset + 0.5) - 0.4 for place in range(len(layers))]
            axes.bar(places, [1e6 * times[name] for times in layers.values()], width, label=name)
        axes.set(title=f"processes: {world_size}", ylabel="microseconds", yscale="log")
        axes.set_xticks(range(len(layers)), ["x".join(map(str, shape)) for shape in layers], fontsize=7)
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), 3 * len(results))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print the tables, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for the table and the chart")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    seconds, device = arguments.seconds, arguments.device
    results = {world_size: run(world_size, seconds, device) for world_size in arguments.processes}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, gloo on the loopback"
    if device == "cuda":
        gpus = f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
        shared = "shared, by sockets" if max(arguments.processes) > torch.cuda.device_count() else "one each"
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        machine = f"{gpus} ({shared}), torch {torch.__version__}, NCCL {nccl}"
    lines = [f"Medians in microseconds; {machine}; {date.today()}.", ""]
    for world_size, (layers, _) in results.items():
        lines += [f"## Processes: {world_size}", "", *layer_table(layers), ""]
    lines += ["## Adding up 2C numbers", "", *sum_table({n: sums for n, (_, sums) in results.items()})]
    print("\n".join(lines))
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "processes" if device == "cpu" else "processes-cuda"
    (arguments.output / f"{name}.md").write_text("# Processes\n\n" + "\n".join(lines) + "\n")
    draw({n: layers for n, (layers, _) in results.items()}, arguments.output / f"{name}.png")


if __name__ == "__main__":
    main()
