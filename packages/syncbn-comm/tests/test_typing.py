from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn_comm

CALLER = Path(__file__).parent / "typed_caller.py"


def test_mypy_accepts_a_typed_caller():
    pytest.importorskip("mypy")
    # mypy finds an installed package by itself, one on the path only when told.
    source = Path(syncbn_comm.__file__).parents[1]
    env = os.environ | ({} if source.name == "site-packages" else {"MYPYPATH": str(source)})
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, str(CALLER)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_typed_caller_runs():
    subprocess.run([sys.executable, "-W", "error", str(CALLER)], timeout=60, check=True)
