"""The example runs across two hosts with addresses of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SKIPPED = 77


@pytest.mark.full
def test_digits_train_as_one_batch_across_two_network_namespaces():
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need root on Linux")
    script = Path(__file__).with_name("two_hosts.sh")
    done = subprocess.run([script, sys.executable], capture_output=True, text=True, timeout=400, check=False)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes; synchronized, they differ from the whole batch by" in done.stdout
