"""What becomes of the timings: verdicts on targets, tables in Markdown, a chart."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain, product

import torch
from matplotlib.figure import Figure
from side_by_side import ORDERS, SETTINGS, Row, seconds_of_others


@dataclass
class Target:
    """A ratio of medians that is to be kept, as the worst of one or several."""

    what: str
    limit: float
    ratios: list[tuple[tuple[str, str], tuple[str, str]]]  # of a (case, variant) to another


def target_table(targets: Iterable[Target], rows: Sequence[Row]) -> str:
    """Compare each target with its ratio under every condition; the first condition counts."""
    medians = {(row.setting, row.order, row.case, row.variant): row.median for row in rows}
    measured = {(row.case, row.variant) for row in rows}
    conditions = list(product(SETTINGS, ORDERS))
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
    header = ["case", "variant", "setting", "order", "median µs", "quartiles", "ratio", "faults per step"]
    lines = []
    for row in rows:
        low, high = row.quartiles
        spread = f"{microseconds(low)} to {microseconds(high)}"
        ratio = f"{row.median / baseline_of(row, rows).median:.2f}"
        faults = f"{row.faults:.0f}"
        shown = (row.case, row.variant, row.setting, row.order, microseconds(row.median))
        lines.append([*shown, spread, ratio, faults])
    return table(header, lines)


def baseline_of(row: Row, rows: Sequence[Row]) -> Row:
    """The first variant of the same case, under the same conditions."""
    same = (row.case, row.setting, row.order)
    return next(other for other in rows if (other.case, other.setting, other.order) == same)


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
        f"OMP_WAIT_POLICY {policy}, {options.seconds} s per variant and condition. Meanwhile other processes "
        f"took {_share_of_others(options):.0%} of the machine's time.{quick}\n"
    )
    text += "".join(f"\n## {title}\n\n{section}\n" for title, section in sections.items())
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.md").write_text(text)
    _chart([row for row in rows if (row.setting, row.order) == ("pinned", "blocks")]).savefig(
        options.output / f"{name}.png", dpi=120
    )


def _share_of_others(options: argparse.Namespace) -> float:
    start, before = options.started
    return (seconds_of_others() - before) / ((time.monotonic() - start) * (os.cpu_count() or 1))


def _chart(rows: Sequence[Row]) -> Figure:
    """Mark each variant's time as a multiple of the first variant's, with its quartiles, by case."""
    cases = list(dict.fromkeys(row.case for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))[1:]
    figure = Figure(figsize=(9, 1.5 + 0.1 * len(cases) * (len(variants) + 2)), layout="constrained")
    axes = figure.subplots()
    for i, variant in enumerate(variants):
        own = [row for row in rows if row.variant == variant]
        unit = [baseline_of(row, rows).median for row in own]
        ratio = [row.median / one for row, one in zip(own, unit)]
        low = [(row.median - row.quartiles[0]) / one for row, one in zip(own, unit)]
        high = [(row.quartiles[1] - row.median) / one for row, one in zip(own, unit)]
        places = [cases.index(row.case) + (i + 1.5) / (len(variants) + 2) - 0.5 for row in own]
        axes.errorbar(ratio, places, xerr=[low, high], fmt="o", ms=4, lw=1, label=variant)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_yticks([place + 0.5 for place in range(len(cases) - 1)], minor=True)
    axes.grid(which="minor", axis="y", lw=0.5)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set(xscale="log", xlabel=f"time / time of {rows[0].variant} (medians, quartiles; pinned, blocks)")
    axes.axvline(1, color="black", lw=0.8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
