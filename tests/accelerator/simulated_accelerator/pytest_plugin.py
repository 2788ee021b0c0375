"""The fixture by which a test asks for the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

REQUIRE = "SYNCBN_REQUIRE_ACCELERATOR"
"""Set to 1, this variable makes a failure of what would be a skip, for machines that have what is needed."""


@pytest.fixture(scope="session")
def accelerator() -> ModuleType:
    """Load the simulated accelerator and return its package; skip the test where it cannot be built."""
    import simulated_accelerator  # only now: it imports torch, and not every package's tests have that

    reason = simulated_accelerator.missing()
    if reason is not None:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{reason}, and {REQUIRE}=1 is set")
        pytest.skip(reason)
    simulated_accelerator.load()
    return simulated_accelerator


@pytest.fixture(autouse=True)
def _no_stream_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the host wait for all devices after a test, so that no stream of it races with the next test."""
    yield
    if "accelerator" in request.fixturenames:
        import torch

        for device in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(device)
