"""Importing is silent and changes nothing outside, for one package after the other."""

import subprocess
import sys

PROGRAM = """
import torch, torch.nn.parallel, torch.utils.checkpoint

def attributes():
    owners = [
        torch, torch.Tensor, torch.utils.checkpoint, torch.nn, torch.nn.functional, torch.nn.parallel,
        torch.nn.modules.batchnorm, torch.nn.Module, torch.nn.DataParallel, *torch.nn.BatchNorm1d.__mro__,
        torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
    ]
    return [dict(vars(owner)) for owner in owners]

before = attributes()
for package in ("syncbn_comm", "syncbn_core", "syncbn_parallel", "syncbn_convert"):
    __import__(package)
    for old, new in zip(before, attributes()):
        changed = [name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)]
        assert not changed, (package, changed)
"""


def test_importing_is_silent_and_patches_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
