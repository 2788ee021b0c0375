"""The processes of syncbn-core's own tests, here for the process group between devices."""

import runpy
from pathlib import Path

import pytest
import torch

_tests_of_core = Path(__file__).parents[2] / "packages" / "syncbn-core" / "tests" / "distributed"
_conftest = runpy.run_path(str(_tests_of_core / "conftest.py"))

processes, new_processes = _conftest["processes"], _conftest["new_processes"]


@pytest.fixture(autouse=True)
def _same_random_numbers_for_every_test() -> None:
    torch.manual_seed(0)
