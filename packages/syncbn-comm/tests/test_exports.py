from __future__ import annotations

import subprocess
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from threading import BrokenBarrierError

import pytest

import syncbn_comm

PUBLIC = {
    "BrokenSyncError",
    "FutureResult",
    "Replica",
    "ReplicaGroup",
    "ReplicaLeftError",
    "SlavePipe",
    "SyncError",
    "SyncMaster",
    "SyncTimeoutError",
    "current_replica",
}


def test_exports_equal_all():
    public = {name for name in vars(syncbn_comm) if not name.startswith("_")}
    assert public == set(syncbn_comm.__all__) == PUBLIC
    assert sorted(syncbn_comm.__all__) == syncbn_comm.__all__


def test_the_version_equals_the_metadata():
    try:
        installed = version("syncbn-comm")
    except PackageNotFoundError:
        pytest.skip("syncbn-comm is not installed here, only on the path")
    assert syncbn_comm.__version__ == installed


def test_the_errors_are_one_family_and_standard_types():
    assert issubclass(syncbn_comm.SyncError, RuntimeError)
    for kind in (syncbn_comm.BrokenSyncError, syncbn_comm.SyncTimeoutError, syncbn_comm.ReplicaLeftError):
        assert issubclass(kind, syncbn_comm.SyncError)
        assert issubclass(kind, BrokenBarrierError)
    assert issubclass(syncbn_comm.SyncTimeoutError, TimeoutError)


def test_a_traceback_names_an_error_as_users_import_it():
    for name in PUBLIC:
        kind = getattr(syncbn_comm, name)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            assert traceback.format_exception_only(kind("why")) == [f"syncbn_comm.{name}: why\n"]


def test_a_class_names_the_package_as_its_module():
    for name in PUBLIC:
        kind = getattr(syncbn_comm, name)
        if isinstance(kind, type):
            assert kind.__module__ == "syncbn_comm"


def test_importing_is_silent_and_brings_in_the_standard_library_alone():
    program = (
        "import sys; before = set(sys.modules); import syncbn_comm; "
        "brought = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(brought - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert (result.stdout.strip(), result.stderr) == ("['syncbn_comm']", "")


def test_every_public_name_is_documented():
    for name in PUBLIC:
        assert getattr(syncbn_comm, name).__doc__, name
