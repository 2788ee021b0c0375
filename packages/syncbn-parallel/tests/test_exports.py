"""What the package shows to the world."""

import subprocess
import sys
from importlib import metadata

import pytest

import syncbn_parallel


def test_the_public_names_are_exactly_those_of_all():
    public = {name for name, value in vars(syncbn_parallel).items() if not name.startswith("_")}
    assert public == set(syncbn_parallel.__all__)
    assert syncbn_parallel.__all__ == sorted(syncbn_parallel.__all__)


@pytest.mark.parametrize("name", ["CallbackContext", "DataParallelWithCallback"])
def test_classes_name_the_public_package(name):
    assert getattr(syncbn_parallel, name).__module__ == "syncbn_parallel"


def test_the_version_is_that_of_the_installed_distribution():
    try:
        installed = metadata.version("syncbn-parallel")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only on the path")
    assert syncbn_parallel.__version__ == installed


def test_importing_is_silent_and_patches_nothing():
    program = """
from torch import nn
before = {c: dict(vars(c)) for c in (nn.Module, nn.DataParallel)}
import syncbn_parallel
assert before == {c: dict(vars(c)) for c in before}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
