"""A training step with and without ``torch.compile``, in one process and in two.

Each process trains on its own batch with one thread, on a core of its own. The variants:

- unsynchronized: torch's ``nn.BatchNorm2d``, not compiled, and compiled;
- eager: ``SynchronizedBatchNorm2d``, not compiled;
- broken graphs: compiled, but each synchronized layer stays outside of the graphs;
- one graph: compiled with ``fullgraph=True``.

A step is forward, loss, backward and SGD. What compiling takes is not measured.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from nets import chain, conv_norm, residual_net
from report import Target, save, target_table, timing_table
from side_by_side import ORDERS, Row, hand_over, options_of, page_faults, under_each_setting
from torch import nn
from torch.profiler import ProfilerActivity, profile

from syncbn_convert import convert_model
from syncbn_core import SynchronizedBatchNorm2d

WORLD_SIZES = (1, 2)
PLAIN, PLAIN_COMPILED = "unsynchronized", "unsynchronized, compiled"
EAGER, BROKEN, WHOLE = "eager", "broken graphs", "one graph"


@dataclass
class Net:
    """A network and the batch of each process."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int

    def case(self, world_size: int) -> str:
        """Name the net in so many processes."""
        return f"{self.name}; processes: {world_size}"


CHAIN = Net("chain of 15, width 8, batch 8, 16x16", chain, 8, 16)
RESIDUAL = Net("residual net of 20, width 32, batch 16, 32x32", residual_net, 16, 32)
QUICK = Net("two layers", lambda: nn.Sequential(conv_norm(3, 4), nn.ReLU(), conv_norm(4, 4)), 2, 8)


def nets_of(options: argparse.Namespace) -> list[Net]:
    """What is measured."""
    return [QUICK] if options.quick else [CHAIN, RESIDUAL]


class Training:
    """A step of SGD on one batch."""

    def __init__(self, net: Net, model: nn.Module, called: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.called = called
        self.images = torch.randn(net.batch, 3, net.size, net.size)
        with torch.no_grad():
            shape = copy.deepcopy(model).eval()(self.images).shape
        self.labels = torch.randint(shape[1], (shape[0], *shape[2:]))
        # So small a rate that hundreds of steps leave the net what it was.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.called(self.images), self.labels).backward()
        self.optimizer.step()


class OwnSequential(nn.Sequential):
    """A ``nn.Sequential`` with code of its own.

    The compiler gives up a loop that a graph breaks in, and from then on it skips this code in every model.
    With the code of ``nn.Sequential``, the other variants would run without the compiler too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Call one module after the other."""
        for module in self:
            input = module(input)
        return input


def runs_compiled(step: Callable[[], None]) -> bool:
    """Whether a step runs what the compiler has made."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return any("CompiledFunction" in event.name for event in profiler.events())


def variants_of(net: Net) -> dict[str, Training]:
    """The same net in all variants, compiled by a first step."""
    torch.manual_seed(0)
    torch.compiler.reset()
    plain = net.build()
    models = [copy.deepcopy(plain) for _ in range(2)]
    models += [convert_model(copy.deepcopy(plain)) for _ in range(3)]
    for module in models[3].modules():
        if isinstance(module, SynchronizedBatchNorm2d):
            module.forward = torch.compiler.disable(module.forward)
        elif type(module) is nn.Sequential:
            module.__class__ = OwnSequential
    called = [
        models[0],
        torch.compile(models[1], fullgraph=True),
        models[2],
        torch.compile(models[3]),
        torch.compile(models[4], fullgraph=True),
    ]
    names = [PLAIN, PLAIN_COMPILED, EAGER, BROKEN, WHOLE]
    variants = {
        name: Training(net, model, call) for name, model, call in zip(names, models, called, strict=True)
    }
    for step in variants.values():
        step()
    for name in (PLAIN_COMPILED, WHOLE):
        if not runs_compiled(variants[name]):
            raise RuntimeError(f"expected {name!r} to run compiled, got a step without the compiler")
    return variants


def measure(case: str, variants: Mapping[str, Training], options: argparse.Namespace) -> list[Row]:
    """Time all variants in blocks and in turns; all processes take the same steps."""
    rows = []
    for order in ORDERS:
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        faults = dict.fromkeys(variants, 0)
        in_turns = order == "turns"
        passes = 1 if options.quick or in_turns else 3
        for names in [list(variants)] if in_turns else [[name] for name in variants] * passes:
            gc.collect()
            for name in names * 3:
                variants[name]()
            budget = options.seconds * (len(names) if in_turns else 1 / passes)
            started = time.perf_counter()
            steps = 0
            fewest = 2 if options.quick else 5
            while agreed(steps < fewest or (time.perf_counter() - started < budget and not options.quick)):
                for name in names:
                    wait_for_others()
                    before, start = page_faults(), time.perf_counter()
                    variants[name]()
                    seconds[name].append(time.perf_counter() - start)
                    faults[name] += page_faults() - before
                steps += 1
        for name, each in seconds.items():
            low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
            rows.append(Row(case, name, order, middle, (low, high), faults[name] / len(each)))
    return rows


def agreed(go_on: bool) -> bool:
    """What process 0 says."""
    if not dist.is_initialized():
        return go_on
    answer = torch.tensor(float(go_on))
    dist.broadcast(answer, 0)
    return bool(answer)


def wait_for_others() -> None:
    """Start a step together."""
    if dist.is_initialized():
        dist.barrier()


def work(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    """Measure in one of the processes; process 0 writes it down."""
    warnings.filterwarnings("default", module=r"torch\.")  # the compiler warns of parts of itself
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # otherwise processes that wake each other meet on one core
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    if world_size > 1:
        store = dist.FileStore(f"{folder}/store-{world_size}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    rows = []
    for net in nets_of(options):
        rows += measure(net.case(world_size), variants_of(net), options)
    if rank == 0:
        torch.save([asdict(row) for row in rows], f"{folder}/rows-{world_size}")
    if world_size > 1:
        dist.destroy_process_group()


def measure_all(options: argparse.Namespace) -> list[Row]:
    """Measure with each number of processes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world_size in WORLD_SIZES:
            mp.spawn(work, (world_size, options, folder), nprocs=world_size)
            rows += [Row(**row) for row in torch.load(f"{folder}/rows-{world_size}", weights_only=True)]
    return rows


def targets(nets: list[Net]) -> list[Target]:
    """What is to be reached."""
    cases = [net.case(world_size) for net in nets for world_size in WORLD_SIZES]
    last = nets[-1].case(2)
    return [
        Target(f"{WHOLE} to {EAGER}, every net", 1.0, [((case, WHOLE), (case, EAGER)) for case in cases]),
        Target(f"{WHOLE} to {BROKEN}, every net", 1.0, [((case, WHOLE), (case, BROKEN)) for case in cases]),
        Target(f"{WHOLE} to {PLAIN_COMPILED}, {last}", 1.3, [((last, WHOLE), (last, PLAIN_COMPILED))]),
    ]


def main() -> None:
    """Measure, or collect what child processes have measured."""
    options = options_of(__doc__)
    if options.part == "timings":
        hand_over(measure_all(options))
        return
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes beside those measured
    known = "TORCHINDUCTOR_CACHE_DIR" in os.environ
    with nullcontext() if known else tempfile.TemporaryDirectory() as cache:
        if cache is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows = under_each_setting(options)
    reached = target_table(targets(nets_of(options)), rows)
    save("compiled", options, {"Targets": reached, "Timings": timing_table(rows)}, rows)


if __name__ == "__main__":
    main()
