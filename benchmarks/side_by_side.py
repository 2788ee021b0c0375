"""Timing variants side by side, which all benchmarks do.

A program measures in child processes of itself, because glibc reads the settings of its allocator when a
process starts. See the README beside this file for what blocks, turns and a pinned allocator are.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# Some variants do not synchronize on purpose.
warnings.filterwarnings("ignore", "expected batch-norm layers that synchronize")

RESULTS = Path(__file__).parent / "results"
ORDERS = ("blocks", "turns")
_PINNED = {  # freed memory stays with the process: a step touches no fresh page
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the highest that glibc takes
}
SETTINGS = {
    "pinned": _PINNED,
    "pinned, short spins": _PINNED | {"GOMP_SPINCOUNT": "10000"},  # of threads that wait for others of OpenMP
    "default": {},
}
_PASSES = 3  # over the blocks, so that a machine that changes its pace does so for every variant
_WARM_UP = 3  # steps at the start of each block

Step = Callable[[], float]
"""One step of a variant; returns its seconds."""


@dataclass
class Row:
    """The steps of one variant."""

    case: str
    variant: str
    order: str  # "blocks" or "turns"
    median: float  # seconds
    quartiles: tuple[float, float]
    faults: float  # page faults per step
    setting: str = ""


def options_of(description: str | None) -> argparse.Namespace:
    """Read the command line that all programs have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each variant, order and setting")
    parser.add_argument("--quick", action="store_true", help="two steps of the smallest case: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for the table and the chart")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a child process measures
    parser.set_defaults(started=(time.monotonic(), seconds_of_others()))
    return parser.parse_args()


def timed(step: Callable[[], object], device: str = "cpu") -> Step:
    """Time a step on the device, from its start to the end of its last kernel."""

    def run() -> float:
        wait_for(device)
        start = time.perf_counter()
        step()
        wait_for(device)
        return time.perf_counter() - start

    return run


def wait_for(device: str) -> None:
    """Wait until the device has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(case: str, variants: Mapping[str, Step], options: argparse.Namespace) -> list[Row]:
    """Time all variants of a case in blocks, each in a steady loop of its own, and then in turns."""
    passes, warm_up, fewest = (1, 1, 2) if options.quick else (_PASSES, _WARM_UP, 5)
    rows = []
    for order in ORDERS:
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        faults = dict.fromkeys(variants, 0)
        in_turns = order == "turns"
        for names in [list(variants)] if in_turns else [[name] for name in variants] * passes:
            gc.collect()
            for name in names * warm_up:
                variants[name]()
            budget = options.seconds * (len(names) if in_turns else 1 / passes)
            steps = 0
            start = time.perf_counter()
            while steps < fewest or (time.perf_counter() - start < budget and not options.quick):
                for name in names:
                    before = page_faults()
                    seconds[name].append(variants[name]())
                    faults[name] += page_faults() - before
                steps += 1
        for name, each in seconds.items():
            low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
            rows.append(Row(case, name, order, middle, (low, high), faults[name] / len(each)))
    return rows


def page_faults() -> int:
    """How many pages the kernel has mapped in for this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def hand_over(results: Sequence[Any]) -> None:
    """In a child process: give what was measured to the parent."""
    print(json.dumps([asdict(each) for each in results]))


def in_child(part: str, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Let this program measure one part in a process of its own; return what that hands over."""
    command = [sys.executable, *sys.argv, "--part", part]
    environment = os.environ | environment
    done = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE)
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def under_each_setting(options: argparse.Namespace, part: str = "timings") -> list[Row]:
    """Measure everything under each of the settings. They change nothing on a GPU: there, by default."""
    settings = {"default": {}} if options.device == "cuda" else SETTINGS
    return [
        Row(**{**row, "setting": setting})
        for setting, environment in settings.items()
        for row in in_child(part, environment)
    ]


def seconds_of_others() -> float:
    """How long the processors have worked for other processes since they were started; Linux tells."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan
    user, nice, system, _, _, *rest = map(int, stat.read_text().split()[1:9])  # without idle, waiting
    own = os.times()
    busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system
