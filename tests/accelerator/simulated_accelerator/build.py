"""The compiled part of the device: built once for each torch and each state of the source, and kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "device.cpp", _HERE / "counting.hpp", _HERE / "streams.hpp")
_NAME = "simulated_accelerator_native"
_COMPLETE = "complete"

BUILDS = _HERE.parents[2] / ".accelerator"
"""Where builds are kept: a folder of the repository that git ignores."""

OLDEST_TORCH = (2, 13)
"""The source is written against the interfaces of this version."""

_native: ModuleType | None = None


def missing() -> str | None:
    """Say what keeps the device from being built and used here; None if nothing does."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"the simulated accelerator needs torch {oldest} or later, got {torch.__version__}"
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "sim":
        # Autograd orders the streams of one kind of accelerator, and would forget those of this one.
        return f"a process can have one kind of accelerator, and this one has {other.type}: hide its devices"
    if sys.platform == "win32":
        return "the simulated accelerator needs file locks of POSIX"
    if (build_folder() / _COMPLETE).exists():
        return None
    with _interpreter_on_path():
        lacking = [name for name in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(name) is None]
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        lacking.append("the headers of Python")
    return f"the simulated accelerator needs {' and '.join(lacking)} to be built" if lacking else None


def build_folder() -> Path:
    """Where the build for this Python, this torch and this source is kept."""
    import torch

    digest = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()
    python = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    return BUILDS / f"{python}-torch-{torch.__version__}-{digest[:16]}"


def native() -> Any:
    """Return the compiled module, built first if it has to be; the same one each time.

    Several processes may call this at once, and a build may have been killed before: the lock here belongs to
    a process and ends with it, unlike the file that torch leaves behind and waits for.
    """
    global _native
    if _native is None:
        folder = build_folder()
        with _one_process_at_a_time(folder):
            if not (folder / _COMPLETE).exists():
                _build(folder)
                (folder / _COMPLETE).touch()
            _native = _imported(folder)
    return _native


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "one_process_at_a_time", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path) -> None:
    from torch.utils import cpp_extension

    (folder / "lock").unlink(missing_ok=True)  # torch's own, of a build that was killed
    with _interpreter_on_path(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and architectures
        cpp_extension.load(
            _NAME,
            [str(_SOURCES[0])],
            build_directory=str(folder),
            extra_cflags=["-O1", "-w"],
            is_python_module=False,
        )


@contextlib.contextmanager
def _interpreter_on_path() -> Iterator[None]:
    """Let ninja be found where pip has installed it, whether that environment is activated or not."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _imported(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, folder / f"{_NAME}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
