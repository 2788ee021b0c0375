"""The public names, and that an import has no side effects."""

import doctest
import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn_core


def test_the_public_names_are_those_of_the_readme():
    public = {name for name in vars(syncbn_core) if not name.startswith("_")}
    modules = {module.name for module in pkgutil.iter_modules(syncbn_core.__path__)}
    assert public - modules == set(syncbn_core.__all__)
    assert syncbn_core.__all__ == sorted(syncbn_core.__all__, key=lambda name: (not name.isupper(), name))
    assert set(syncbn_core.__all__) == {
        "THIS_PROCESS",
        "BatchNorm2dReimpl",
        "SynchronizedBatchNorm",
        "SynchronizedBatchNorm1d",
        "SynchronizedBatchNorm2d",
        "SynchronizedBatchNorm3d",
        "set_sbn_eps_mode",
    }


def test_the_version_is_that_of_the_installed_distribution():
    try:
        installed = importlib.metadata.version("syncbn-core")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs on the sources, not on an installed distribution")
    assert syncbn_core.__version__ == installed


def test_the_examples_of_the_readme_run():
    readme = Path(__file__).parents[1] / "README.md"
    results = doctest.testfile(str(readme), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0


def test_an_import_is_silent_and_changes_nothing_in_torch():
    code = """
import torch, torch.nn.parallel
def look():
    return [dict(vars(o)) for o in (torch.nn.parallel, torch.nn.parallel.DataParallel, torch.nn.Module,
                                    torch.nn.modules.batchnorm, torch.nn.BatchNorm2d)]
before = look()
import syncbn_core
assert look() == before
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
