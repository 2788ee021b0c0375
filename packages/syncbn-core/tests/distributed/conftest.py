"""Worker processes for tests: shared ones by their number, and new ones for tests that break them."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Processes = runpy.run_path(str(Path(__file__).with_name("processes.py")))["Processes"]


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Any]]:
    """Return the shared processes of a world size; new ones if a test has ended them."""
    known: dict[int, Any] = {}

    def of_size(world_size: int) -> Any:
        if world_size not in known or known[world_size].ended:
            known[world_size] = Processes(world_size)
        return known[world_size]

    yield of_size
    for workers in known.values():
        workers.end()


@pytest.fixture
def new_processes() -> Iterator[Callable[..., Any]]:
    """Return processes for one test only."""
    started: list[Any] = []

    def start(*args: Any, **kwargs: Any) -> Any:
        started.append(Processes(*args, **kwargs))
        return started[-1]

    yield start
    for workers in started:
        workers.end()
