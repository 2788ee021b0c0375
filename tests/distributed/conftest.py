"""The processes of syncbn-core's own tests, here for replicas in each of them."""

import runpy
from pathlib import Path

_tests_of_core = Path(__file__).parents[2] / "packages" / "syncbn-core" / "tests" / "distributed"
_conftest = runpy.run_path(str(_tests_of_core / "conftest.py"))

processes, new_processes = _conftest["processes"], _conftest["new_processes"]
