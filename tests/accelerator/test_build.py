"""The device is built once, and a build that was killed does not keep the next one waiting."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simulated_accelerator

pytest_plugins = ["pytester"]

LIMIT_SECONDS = 120.0

# A module that takes no time to compile stands for the device.
SOURCE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "simulated_accelerator_native", 0, -1};
PyMODINIT_FUNC PyInit_simulated_accelerator_native(void) { return PyModule_Create(&definition); }
"""

PROGRAM = """
import sys
from pathlib import Path
from simulated_accelerator import build

folder = Path(sys.argv[1])
build.BUILDS, build._SOURCES = folder / "builds", (folder / "source.cpp",)
print(build.missing() or build.native().__name__)
"""

# It says that it has begun, and never ends.
COMPILER_THAT_HANGS = """#!/bin/sh
case "$*" in *--version*|*-v*) exec c++ "$@";; esac
echo begun > "$(dirname "$0")/begun"
exec tail -f /dev/null
"""


class Builder:
    def __init__(self, folder: Path, package: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        (folder / "source.cpp").write_text(SOURCE)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.folder)],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def result(self, process: subprocess.Popen[str]) -> str:
        try:
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, errors
        return output.strip()


@pytest.fixture
def builder(tmp_path: Path, accelerator) -> Builder:
    return Builder(tmp_path, Path(accelerator.__file__).parent)


def test_a_build_after_one_that_was_killed_does_not_hang(builder: Builder) -> None:
    compiler = builder.folder / "compiler"
    compiler.write_text(COMPILER_THAT_HANGS)
    compiler.chmod(0o755)
    os.mkfifo(builder.folder / "begun")
    killed = builder.start(CXX=str(compiler))
    assert (builder.folder / "begun").read_text() == "begun\n"  # waits until the compiler runs
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=LIMIT_SECONDS)
    assert list(builder.folder.glob("builds/*/lock"))  # torch's, which nobody will remove
    assert builder.result(builder.start()) == "simulated_accelerator_native"


def test_processes_that_build_at_once_wait_for_one_build(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = [builder.start() for _ in range(2)]
    assert [builder.result(process) for process in processes] == ["simulated_accelerator_native"] * 2
    monkeypatch.setattr("simulated_accelerator.build.BUILDS", builder.folder / "builds")
    monkeypatch.setattr("simulated_accelerator.build._SOURCES", (builder.folder / "source.cpp",))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert simulated_accelerator.missing() is None  # it is there already


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator) -> None:
    monkeypatch.setattr("simulated_accelerator.build.BUILDS", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert accelerator.missing() == "the simulated accelerator needs no-such-compiler to be built"
    monkeypatch.setenv("CXX", sys.executable)  # anything that can be found
    assert accelerator.missing() is None
    monkeypatch.setattr("simulated_accelerator.build.OLDEST_TORCH", (99, 0))
    assert "needs torch 99.0 or later" in accelerator.missing()


def test_a_process_with_another_kind_of_accelerator_does_not_get_this_one(
    monkeypatch: pytest.MonkeyPatch, accelerator
) -> None:
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    assert "this one has cuda" in accelerator.missing()


def test_ninja_is_found_beside_the_interpreter_though_it_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator
) -> None:
    ninja = tmp_path / "ninja"
    ninja.touch(0o755)
    monkeypatch.setattr("simulated_accelerator.build.BUILDS", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("CXX", "/bin/sh")
    monkeypatch.setenv("PATH", "")
    assert accelerator.missing() is None
    ninja.unlink()
    assert accelerator.missing() == "the simulated accelerator needs ninja to be built"


@pytest.mark.parametrize(("required", "outcome"), [("0", "skipped"), ("1", "errors")])
def test_without_a_compiler_tests_are_skipped_unless_they_are_required(
    required: str, outcome: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, accelerator
) -> None:
    monkeypatch.setenv("SYNCBN_REQUIRE_ACCELERATOR", required)
    monkeypatch.setattr("simulated_accelerator.build.missing", lambda: "no compiler")
    pytester.makeconftest("pytest_plugins = ['simulated_accelerator.pytest_plugin']")
    pytester.makepyfile("def test_something(accelerator): pass")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rsfE")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(["*no compiler*"])
