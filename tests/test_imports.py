"""Importing is silent and changes nothing outside."""

import subprocess
import sys

import pytest

PACKAGES = ["syncbn_comm", "syncbn_core", "syncbn_parallel", "syncbn_convert"]

LOOK = """
import torch, torch.nn.parallel, torch.utils.checkpoint

def attributes():
    owners = [
        torch, torch.Tensor, torch.utils.checkpoint, torch.nn, torch.nn.functional, torch.nn.parallel,
        torch.nn.modules.batchnorm, torch.nn.Module, torch.nn.DataParallel, *torch.nn.BatchNorm1d.__mro__,
        torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
    ]
    return [dict(vars(owner)) for owner in owners]

before = attributes()
import {package}
for old, new in zip(before, attributes()):
    changed = [name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)]
    assert not changed, changed
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_is_silent(package):
    done = run("-W", "error", "-c", f"import {package}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_patches_nothing(package):
    done = run("-c", LOOK.format(package=package))
    assert done.returncode == 0, done.stderr
