"""The public names of the package, and what importing it does."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import syncbn_convert


def test_the_exports_are_those_of_the_design():
    assert syncbn_convert.__all__ == [
        "Report",
        "ReportRow",
        "SkipRule",
        "convert_model",
        "inspect_model",
        "patch_sync_batchnorm",
        "register_conversion",
        "revert_model",
    ]
    public = {name for name in vars(syncbn_convert) if not name.startswith("_")}
    assert public == set(syncbn_convert.__all__)


def test_a_class_names_the_package_as_its_module():
    for name in ("Report", "ReportRow"):
        assert getattr(syncbn_convert, name).__module__ == "syncbn_convert"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'syncbn_convert' has no attribute 'convert'"):
        syncbn_convert.convert  # noqa: B018


def test_the_version_is_that_of_the_installed_distribution():
    try:
        installed = metadata.version("syncbn-convert")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout: syncbn-convert is not installed")
    assert syncbn_convert.__version__ == installed


def test_only_public_names_of_the_other_packages_are_imported():
    for path in Path(syncbn_convert.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(
                ("syncbn_core", "syncbn_parallel")
            ):
                assert node.module in ("syncbn_core", "syncbn_parallel"), f"{path.name}: {node.module}"
                assert not [name.name for name in node.names if name.name.startswith("_")], path.name


def test_importing_is_silent_and_patches_nothing_and_no_conversion_imports_timm():
    program = (
        "import sys, torch\n"
        "from torch.nn.modules import batchnorm, module\n"
        "from torch.nn.parallel import data_parallel, distributed\n"
        "places = [torch.nn, batchnorm, module, data_parallel, distributed]\n"
        "places += [v for p in places for v in vars(p).values() if isinstance(v, type)]\n"
        "before = [dict(vars(p)) for p in places]\n"
        "import syncbn_convert\n"
        "assert [dict(vars(p)) for p in places] == before\n"
        "syncbn_convert.convert_model(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))\n"
        "assert 'timm' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
