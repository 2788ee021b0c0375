"""A time limit for every test: a test that hangs ends the run, and shows what all threads are doing.

pytest can do this from version 9 on (``faulthandler_exit_on_timeout``). The GPU tests use the pytest of their
machine, which may be older.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from contextlib import contextmanager

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
