"""What the benchmarks share: timing variants side by side, judging ratios, writing tables and charts.

A program measures in child processes of itself, because glibc reads the settings of its allocator when a
process starts. See the README beside this file for what blocks, turns and a pinned allocator are.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
ORDERS = ("blocks", "turns")
ALLOCATORS = {
    "pinned": {  # freed memory stays with the process: a step touches no fresh page
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
        "MALLOC_TOP_PAD_": str(2**28),
        "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the highest that glibc takes
    },
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
    allocator: str = ""


@dataclass
class Target:
    """A ratio of medians that is to be kept, as the worst of one or several."""

    what: str
    limit: float
    ratios: list[tuple[tuple[str, str], tuple[str, str]]]  # of a (case, variant) to another


def options_of(description: str | None) -> argparse.Namespace:
    """Read the command line that all programs have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each variant, order and allocator")
    parser.add_argument("--quick", action="store_true", help="two steps of the smallest case: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder for the table and the chart")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a child process measures
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


def under_each_allocator(part: str = "timings") -> list[Row]:
    """Measure everything with the allocator pinned, and again with it as it is."""
    return [
        Row(**{**row, "allocator": allocator})
        for allocator, environment in ALLOCATORS.items()
        for row in in_child(part, environment)
    ]


def target_table(targets: Iterable[Target], rows: Sequence[Row]) -> str:
    """Compare each target with its ratio under every condition; the first condition counts."""
    medians = {(row.allocator, row.order, row.case, row.variant): row.median for row in rows}
    measured = {(row.case, row.variant) for row in rows}
    conditions = list(product(ALLOCATORS, ORDERS))
    lines = []
    for target in targets:
        if not measured.issuperset(chain.from_iterable(target.ratios)):  # with --quick
            continue
        worst = [
            max(medians[*condition, *above] / medians[*condition, *below] for above, below in target.ratios)
            for condition in conditions
        ]
        verdict = "yes" if worst[0] <= target.limit else "**no**"
        lines.append([target.what, f"{target.limit:.2f}", *(f"{ratio:.2f}" for ratio in worst), verdict])
    return table(["target", "at most", *(", ".join(c) for c in conditions), "reached"], lines)


def timing_table(rows: Sequence[Row]) -> str:
    """All medians, their quartiles, their ratios to the case's first variant, and page faults."""
    header = ["case", "variant", "allocator", "order", "median µs", "quartiles", "ratio", "faults per step"]
    lines = []
    for row in rows:
        low, high = row.quartiles
        spread = f"{microseconds(low)} to {microseconds(high)}"
        ratio = f"{row.median / baseline_of(row, rows).median:.2f}"
        faults = f"{row.faults:.0f}"
        shown = (row.case, row.variant, row.allocator, row.order, microseconds(row.median))
        lines.append([*shown, spread, ratio, faults])
    return table(header, lines)


def baseline_of(row: Row, rows: Sequence[Row]) -> Row:
    """The first variant of the same case, under the same conditions."""
    same = (row.case, row.allocator, row.order)
    return next(other for other in rows if (other.case, other.allocator, other.order) == same)


def microseconds(seconds: float) -> str:
    """Show a time by three digits or more."""
    return f"{1e6 * seconds:,.{0 if seconds >= 1e-4 else 1}f}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def save(name: str, options: argparse.Namespace, sections: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Print the sections, and keep them and a chart of the ratios in the folder for results."""
    name += "-cuda" if options.device == "cuda" else ""
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    quick = " Two steps each: these numbers mean nothing." if options.quick else ""
    text = (
        f"# {name}\n\n{date.today()}: {device} ({platform.machine()}), {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"OMP_WAIT_POLICY {policy}, {options.seconds} s per variant and condition.{quick}\n"
    )
    text += "".join(f"\n## {title}\n\n{section}\n" for title, section in sections.items())
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.md").write_text(text)
    _chart([row for row in rows if (row.allocator, row.order) == ("pinned", "blocks")]).savefig(
        options.output / f"{name}.png", dpi=120
    )


def _chart(rows: Sequence[Row]) -> Figure:
    """Draw each variant's time as a multiple of the first variant's, with its quartiles, by case."""
    cases = list(dict.fromkeys(row.case for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.16 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        own = [row for row in rows if row.variant == variant]
        unit = [baseline_of(row, rows).median for row in own]
        ratio = [row.median / one for row, one in zip(own, unit)]
        low = [(row.median - row.quartiles[0]) / one for row, one in zip(own, unit)]
        high = [(row.quartiles[1] - row.median) / one for row, one in zip(own, unit)]
        places = [cases.index(row.case) + i * height - 0.4 for row in own]
        axes.barh(places, ratio, height, xerr=[low, high], label=variant, error_kw={"lw": 0.8})
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="median time / median time of the first variant (pinned allocator, blocks)")
    axes.axvline(1, color="black", lw=0.8)
    axes.legend(fontsize=8)
    return figure
