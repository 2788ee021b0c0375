"""Compare a table in a page with the one that a program has just printed; ``nox -s demo`` runs this.

Usage: ``python tests/compare_figures.py README.md OUTPUT``. The first table of OUTPUT has to stand in the
page, under the same header. Percentages are compared exactly, losses by a unit in their last digit, and
distances (``3e-11``) by their power of ten, give or take one.
"""

import re
import sys
from itertools import takewhile
from pathlib import Path

DISTANCE = re.compile(r"\d(\.\d)?e[+-]\d\d")
DECIMAL = re.compile(r"\d+\.\d+")


def first_table(text: str, header: str | None = None) -> list[list[str]]:
    """Return the rows of the first table, or of the first one with this header."""
    lines = text.splitlines()
    starts = (i for i, line in enumerate(lines) if line.startswith("|") and header in (None, line.strip()))
    start = next(starts, len(lines))
    rows = takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]


def agree(documented: str, printed: str) -> bool:
    """Tell whether a cell in the page says what was printed."""
    if DISTANCE.fullmatch(documented) and DISTANCE.fullmatch(printed):
        some, other = float(documented), float(printed)
        return some == other == 0 or (some > 0 and 0.09 <= other / some <= 11)
    if DECIMAL.fullmatch(documented) and DECIMAL.fullmatch(printed):
        unit = 10.0 ** -len(documented.partition(".")[2])
        return abs(float(documented) - float(printed)) <= 1.01 * unit
    return documented == printed


def differences(page: str, output: str) -> list[str]:
    """Say in which cells the page differs from the output."""
    printed = first_table(output)
    if not printed:
        return ["the output has no table"]
    documented = first_table(page, "| " + " | ".join(printed[0]) + " |")
    if len(documented) != len(printed):
        return [f"expected a table of {len(printed)} lines under {printed[0]}, got {len(documented)} lines"]
    return [
        f"{row[0]}: documented {cell!r}, printed {new!r}"
        for row, new_row in zip(documented, printed, strict=True)
        for cell, new in zip(row, new_row, strict=True)
        if not agree(cell, new)
    ]


if __name__ == "__main__":
    texts = [Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]]
    if found := differences(*texts):
        sys.exit("\n".join([f"{sys.argv[1]} does not say what was printed:", *found]))
    print(f"{sys.argv[1]} says what was printed")
