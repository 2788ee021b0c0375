"""What all test suites of this repository share: a time limit, and how large matrices are thinned.

A test that hangs ends the run, and shows what all threads are doing. pytest can do this from version 9 on
(``faulthandler_exit_on_timeout``). The GPU tests use the pytest of their machine, which may be older.
"""

from __future__ import annotations

import faulthandler
import os
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest

pytest_plugins = ["simulated_accelerator.pytest_plugin"]  # the fixture that asks for the accelerator

SECONDS = 600.0  # much longer than any test takes, and than the default of SYNCBN_TIMEOUT

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # while a test runs, pytest captures the original


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr])


@contextmanager
def time_limit(item: pytest.Item) -> Generator[None]:
    mark = item.get_closest_marker("time_limit")
    seconds = mark.args[0] if mark else SECONDS
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_stderr])
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# Each part has a limit, because pytest cancels a running one when a test fails.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with time_limit(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with time_limit(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    with time_limit(item):
        return (yield)


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
