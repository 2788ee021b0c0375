"""What becomes of the timings: verdicts on targets, tables in Markdown, a chart.

``python benchmarks/report.py benchmarks/results/*.md`` draws the charts anew from the tables.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from side_by_side import Row, seconds_of_others


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
    conditions = list(dict.fromkeys((row.setting, row.order) for row in rows))
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
    _save_chart(rows, options.output / f"{name}.png")


def _share_of_others(options: argparse.Namespace) -> float:
    start, before = options.started
    return (seconds_of_others() - before) / ((time.monotonic() - start) * (os.cpu_count() or 1))


@dataclass
class Panel:
    """One question of a chart: how the times of some cases compare."""

    title: str
    cases: dict[str, str]  # the label of each case
    variants: list[str]


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """Choose what a reader can take in: one panel per layout, in float32 and for the fewest replicas.

    The tables have the rest. Cases without layouts come in one panel.
    """
    cases = list(dict.fromkeys(row.case for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))[1:]
    if any(variant.startswith("2 ") for variant in variants):
        variants = [variant for variant in variants if not variant.startswith("4 ")]
    layouts = ("contiguous", "channels_last")
    panels = []
    for layout in layouts:
        ending = f" {layout} float32"
        of_layout = {case: case.removesuffix(ending) for case in cases if case.endswith(ending)}
        if of_layout:
            panels.append(Panel(f"{layout}, float32", of_layout, variants))
    return panels or [Panel("", {case: case.replace(", ", "\n", 1) for case in cases}, variants)]


def _chart(rows: Sequence[Row]) -> Figure:
    """Draw each variant's time as a multiple of the first variant's, with its quartiles."""
    panels = panels_of(rows)
    bars = max(len(panel.cases) * (len(panel.variants) + 1) for panel in panels)
    figure = Figure(figsize=(9, 1.3 + 0.21 * bars), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, panels):
        _draw(axes, panel, rows)
    names, handles = list(map(_in_words, panels[0].variants)), grid[0].containers
    bars_alone = [handle for handle in handles if isinstance(handle, BarContainer)]
    figure.legend(bars_alone, names, loc="outside upper left", ncols=len(names), frameon=False)
    figure.supxlabel(f"time of a step / time of {rows[0].variant}; less is better", fontsize=10)
    return figure


def _in_words(variant: str) -> str:
    """Return "synchronized, 2 replicas" for "2 synchronized"."""
    number, _, rest = variant.partition(" ")
    return f"{rest}, {number} replicas" if number.isdigit() else variant


def _draw(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:
    height = 1 / (len(panel.variants) + 1)
    for i, variant in enumerate(panel.variants):
        own = [row for row in rows if row.variant == variant and row.case in panel.cases]
        unit = [baseline_of(row, rows).median for row in own]
        ratio = [row.median / one for row, one in zip(own, unit)]
        low = [(row.median - row.quartiles[0]) / one for row, one in zip(own, unit)]
        high = [(row.quartiles[1] - row.median) / one for row, one in zip(own, unit)]
        places = [
            list(panel.cases).index(row.case) + (i + 0.5 - len(panel.variants) / 2) * height for row in own
        ]
        color = _COLORS["synchronized"] if variant.endswith(" synchronized") else _COLORS.get(variant)
        color = color or _OTHERS[i % len(_OTHERS)]
        axes.barh(places, ratio, height=0.9 * height, color=color, xerr=[low, high], error_kw=_ERRORS)
        for place, value, above in zip(places, ratio, high):
            axes.annotate(
                f"{value:.2f}",
                (value + above, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                size=8,
            )
    axes.set_yticks(range(len(panel.cases)), panel.cases.values(), fontsize=9)
    axes.set_ylim(len(panel.cases) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_title(panel.title, fontsize=10)
    axes.axvline(1, color="black", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


_COLORS = {"synchronized": "tab:blue"}
_OTHERS = ("0.75", "0.55", "tab:olive", "tab:brown")
_ERRORS = {"elinewidth": 0.8, "ecolor": "0.3"}


def rows_in(text: str) -> list[Row]:
    """Read the timings back from a table that `save` has written."""

    def seconds(shown: str) -> float:
        return float(shown.replace(",", "")) / 1e6

    rows = []
    for line in text.partition("## Timings")[2].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 8 and cells[0] not in ("case", "---"):
            case, variant, setting, order, median, spread, _, faults = cells
            low, high = map(seconds, spread.split(" to "))
            rows.append(Row(case, variant, order, seconds(median), (low, high), float(faults), setting))
    return rows


def redraw(path: Path) -> None:
    """Draw the chart beside a table anew."""
    rows = rows_in(path.read_text(encoding="utf-8"))
    _save_chart(rows, path.with_suffix(".png"))


def _save_chart(rows: Sequence[Row], path: Path) -> None:
    first = (rows[0].setting, rows[0].order)  # as in `target_table`, the first condition counts
    _chart([row for row in rows if (row.setting, row.order) == first]).savefig(path, dpi=110)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        redraw(Path(name))
