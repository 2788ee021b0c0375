"""``pip install`` by the packages' names, from dist/ alone, into empty environments beside torch."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
USE = {
    "syncbn_comm": "assert syncbn_comm.ReplicaGroup(1).member(0).all_gather(3) == [3]",
    "syncbn_core": "import torch; syncbn_core.SynchronizedBatchNorm1d(2)(torch.randn(3, 2))",
    "syncbn_parallel": (
        "import torch; syncbn_parallel.DataParallelWithCallback(torch.nn.ReLU(), ['cpu'] * 2)(torch.ones(4))"
    ),
    "syncbn_convert": "import torch; syncbn_convert.convert_model(torch.nn.BatchNorm1d(2))",
}
BRINGS = {
    ("syncbn-comm",): {"syncbn_comm"},
    ("syncbn-core",): {"syncbn_comm", "syncbn_core"},
    ("syncbn-parallel",): {"syncbn_comm", "syncbn_parallel"},
    ("syncbn-convert",): set(USE),
    ("syncbn-core", "syncbn-parallel"): {"syncbn_comm", "syncbn_core", "syncbn_parallel"},
    ("syncbn-comm", "syncbn-core", "syncbn-parallel", "syncbn-convert"): set(USE),
}


def environment_without_pips_settings():
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    settings.pop("PYTHONPATH", None)
    return settings | {"PIP_CONFIG_FILE": os.devnull}


def run(*command, succeeds=True):
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment_without_pips_settings(),
    )
    assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def new_environment(tmp_path):
    """Make an environment that has pip, and on request the torch of this one, and nothing else."""

    def make(with_torch):
        folder = tmp_path / "environment"
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        run(python, "-m", "pip", "uninstall", "--yes", "setuptools")  # which Python 3.11 brings, and too old
        if with_torch:
            site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
            (Path(site) / "torch_of_another_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python

    return make


@pytest.mark.skipif(sys.platform == "win32", reason="the environments' paths are those of POSIX")
@pytest.mark.parametrize("names", BRINGS, ids=" ".join)
def test_the_names_install_from_dist_with_what_they_need_and_nothing_else(names, new_environment):
    for module in USE:
        assert find_spec(module) is None, f"{module} is in the environment that lends its torch"
    python = new_environment(with_torch=names != ("syncbn-comm",))

    run(python, "-m", "pip", "install", *names, "--find-links", "dist", "--no-index")

    for module, use in USE.items():
        run(python, "-c", f"import {module}; {use}", succeeds=module in BRINGS[names])
    assert "No broken requirements found" in run(python, "-m", "pip", "check")


def test_without_torch_packages_that_need_it_do_not_install(new_environment):
    python = new_environment(with_torch=False)
    install = (python, "-m", "pip", "install", "syncbn-core", "--find-links", "dist", "--no-index")

    assert "torch" in run(*install, succeeds=False)


def test_the_readme_shows_names_that_are_in_dist():
    (line,) = re.findall(r"pip install (.*) --find-links dist", (ROOT / "README.md").read_text())
    for name in line.split():
        for ending in ("*.whl", "*.tar.gz"):
            assert list(DIST.glob(f"{name.replace('-', '_')}-{ending}")), name
