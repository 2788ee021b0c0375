"""A test that hangs ends the run, in setup, call and teardown."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HANGS = {
    "setup": "@pytest.fixture\ndef hangs():\n    hang()\n",
    "call": "@pytest.fixture\ndef hangs():\n    return hang\n",
    "teardown": "@pytest.fixture\ndef hangs():\n    yield\n    hang()\n",
}
TEST = """
import threading
import pytest

def hang():
    threading.Event().wait()

{fixture}
@pytest.mark.time_limit(0.5)
def test_that_hangs(hangs):
    if hangs:
        hangs()

def test_that_comes_after():
    print("not reached")
"""


@pytest.mark.parametrize("part", HANGS)
def test_a_test_that_hangs_ends_the_run_and_shows_where(part, tmp_path):
    (tmp_path / "test_hanging.py").write_text(TEST.format(fixture=HANGS[part]))
    shutil.copy(ROOT / "conftest.py", tmp_path)
    options = ["-c", str(ROOT / "pyproject.toml"), "--confcutdir", str(tmp_path), "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Timeout (0:00:00.5" in result.stderr
    assert 'test_hanging.py", line 6 in hang' in result.stderr
    assert "passed" not in result.stdout
