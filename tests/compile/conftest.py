"""Processes that compile: shared ones for all tests, and new ones for tests that break them."""

import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Workers = runpy.run_path(str(Path(__file__).with_name("workers.py")))["Workers"]


@pytest.fixture(scope="session")
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the code that Inductor compiles in this run."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(scope="session")
def workers(compiler_cache: Path) -> Iterator[Callable[[int], Any]]:
    """Return the shared workers of a world size; new ones if a test has ended them."""
    known: dict[int, Any] = {}

    def of_size(world_size: int) -> Any:
        if world_size not in known or known[world_size].ended:
            known[world_size] = Workers(world_size, compiler_cache)
        return known[world_size]

    yield of_size
    for each in known.values():
        each.end()


@pytest.fixture
def new_workers(compiler_cache: Path) -> Iterator[Callable[..., Any]]:
    """Return workers for one test only."""
    started: list[Any] = []

    def start(world_size: int, group_seconds: float) -> Any:
        started.append(Workers(world_size, compiler_cache, group_seconds))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture
def _needs_a_cpp_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
