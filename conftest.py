"""What all test-suites of this repository share: how a large matrix of parameters is thinned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

Pair = tuple[tuple[str, int], ...]  # one parameter's value alone where a test has a single parameter


def pairwise_cover(cases: Sequence[dict[str, int]]) -> set[int]:
    """Choose cases such that any two values of two parameters that occur together do so in a chosen case.

    Args:
        cases: for each case, a number for each parameter's value, by the parameter's name.

    Returns:
        The positions of the chosen cases, found greedily: few, not the fewest.
    """
    pairs: list[set[Pair]] = [set(combinations(sorted(case.items()), min(2, len(case)))) for case in cases]
    missing: set[Pair] = set().union(*pairs)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


@pytest.hookimpl(tryfirst=True)  # before ``-m`` deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the accelerator, and what of a ``pairwise`` test is not needed to cover all pairs."""
    for item in items:
        if "accelerator" in getattr(item, "fixturenames", ()):
            item.add_marker("accelerator")
    tests: defaultdict[str, list[Any]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("pairwise"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        # The values of a parameter are the same objects in all cases.
        values = [{name: id(value) for name, value in case.callspec.params.items()} for case in cases]
        chosen = pairwise_cover(values)
        for position, case in enumerate(cases):
            if position not in chosen:
                case.add_marker("full")
