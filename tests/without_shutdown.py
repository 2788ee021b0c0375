"""Run a program, ``python tests/without_shutdown.py PROGRAM [ARGUMENT ...]``, without Python's own shutdown.

For programs in which a ``DistributedDataParallel`` communicates over gloo. A thread of gloo can free the
tensors of the last broadcast while Python shuts down. Then torch ends the process with "terminate called
without an active exception". This is rare, and it depends on the load of the machine. By then, these programs
have done what the tests look at.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
