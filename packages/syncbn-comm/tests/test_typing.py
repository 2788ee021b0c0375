from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CALLER = Path(__file__).parent / "typed_caller.py"


def test_mypy_accepts_a_typed_caller():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "/dev/null", str(CALLER)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_typed_caller_runs():
    subprocess.run([sys.executable, "-W", "error", str(CALLER)], timeout=60, check=True)
