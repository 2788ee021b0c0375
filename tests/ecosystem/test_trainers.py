"""Libraries that wrap the model themselves: the examples convert it before and equal the whole batch."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT_SHUTDOWN = str(Path(__file__).parents[1] / "without_shutdown.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WITHOUT_SHUTDOWN)


def distance_printed_by(*command: str) -> float:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize(
    ("row", "command"),
    [
        (
            ("transformers", "`Trainer`, which makes an `nn.DataParallel`", "transformers_trainer.py"),
            (str(EXAMPLES / "transformers_trainer.py"),),
        ),
        (
            ("accelerate", "`prepare`, which makes a `DistributedDataParallel`", "accelerate_ddp.py"),
            (*TORCHRUN, str(EXAMPLES / "accelerate_ddp.py")),
        ),
        (
            ("pytorch-lightning", "layer-sync plugin, under DDP", "lightning_layer_sync.py"),
            (str(EXAMPLES / "lightning_layer_sync.py"),),
        ),
    ],
    ids=["transformers", "accelerate", "lightning"],
)
def test_the_example_of_a_library_that_wraps_the_model_reaches_the_whole_batch(row, command, tables):
    library, what, example = row

    assert distance_printed_by(*command) < 1e-9

    tables.add(
        "tools",
        f"{library} {version(library)}: {what}",
        f"works, the weights of the whole batch: `examples/{example}`",
    )
