"""Worker processes of one gloo group that compile models; both sides of them.

The tests load this file for `Workers`, and each worker runs it as a program. The workers stay until the end
of the session and share a folder for the compiler's cache. Every wait has a limit.
"""

import faulthandler
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ANSWER_SECONDS = 300.0  # Inductor's C++ compiler is slow on a busy machine


class Workers:
    """Worker processes, as the tests see them.

    Args:
        world_size: how many.
        folder: a new one, for their store.
        cache: a folder for the compiler's cache.
        group_seconds: the timeout of their collectives.
    """

    def __init__(self, world_size: int, folder: Path, cache: Path, group_seconds: float = 60.0) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        settings = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of further processes
        }
        if sys.platform == "linux":
            settings["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(world_size):
            ours, theirs = Pipe()
            with closing(theirs):
                numbers = map(str, (theirs.fileno(), rank, world_size, group_seconds))
                command = [sys.executable, __file__, str(folder / "store"), *numbers]
                environment = {**os.environ, **settings}
                self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment))
            self._pipes.append(ours)

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(world, *arguments)`` in all workers.

        The workers call the function of the same name in the same file.

        Returns:
            In rank order ``{"result": ...}`` or ``{"error": traceback}``; None for a worker that has ended or
            does not answer in time.
        """
        call = pickle.dumps((function.__code__.co_filename, function.__qualname__, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        return [self._outcome(pipe) for pipe in self._pipes]

    def _outcome(self, pipe: Connection) -> Any:
        try:
            return pickle.loads(pipe.recv_bytes()) if pipe.poll(ANSWER_SECONDS) else None
        except (EOFError, ConnectionError):
            return None

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(world, *arguments)`` in all workers; return what it returns, in rank order."""
        outcomes = self.outcomes(function, *arguments)
        failures = [
            f"worker {rank}: {'no answer' if outcome is None else outcome['error']}"
            for rank, outcome in enumerate(outcomes)
            if outcome is None or "error" in outcome
        ]
        if failures:
            self.end()
            raise AssertionError("\n".join(failures))
        return [outcome["result"] for outcome in outcomes]

    @property
    def ended(self) -> bool:
        """Whether the workers have been ended."""
        return not self._pipes

    def end(self) -> None:
        """End the workers, whatever they do."""
        for process in self._processes:
            process.kill()
            process.wait(ANSWER_SECONDS)
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []


class World:
    """The first argument of a function that runs in a worker."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def share(self, whole: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this process's rows of the whole batch."""
        return whole.split(list(sizes))[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def assert_equals_whole_batch(
        self,
        called: nn.Module,
        model: nn.Module,
        twin: nn.Module,
        whole: Tensor,
        sizes: Sequence[int],
        averaged: bool = False,
        dtype: torch.dtype | None = None,
        **tolerance: float,
    ) -> None:
        """Train a step on this share, and an uncompiled twin of torch's layers on the whole batch.

        Args:
            called: the module that is called on the share, such as a compiled model.
            model: the module that has its parameters and buffers.
            twin: the same model of torch's own layers.
            whole: the batch of all processes.
            sizes: the processes' shares of it.
            averaged: whether `called` averages the gradients, as DDP does.
            dtype: of the share, if not that of the batch.
            **tolerance: for ``torch.testing.assert_close``.
        """
        model.zero_grad()
        twin.zero_grad()
        x = self.share(whole, sizes).to(dtype or whole.dtype, copy=True).requires_grad_()
        whole = whole.clone(memory_format=torch.preserve_format).requires_grad_()
        y = called(x)
        expected = twin(whole)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
        (y * self.share(weights, sizes).to(y)).sum().backward()
        (expected * weights).sum().backward()
        close = {"check_dtype": False, **tolerance}
        torch.testing.assert_close(y, self.share(expected, sizes), **close)
        torch.testing.assert_close(x.grad, self.share(whole.grad, sizes), **close)
        for (name, parameter), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            ours = parameter.grad * self.size if averaged else self.total(parameter.grad)
            torch.testing.assert_close(ours, theirs.grad, msg=f"d {name}: {{}}".format, **close)
        for (name, buffer), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(buffer, theirs, msg=f"{name}: {{}}".format, **close)


def serve(pipe: Connection, world: World) -> None:
    """Run functions as they are requested, until the requests end."""
    modules: dict[str, Any] = {}
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            path, name, arguments = pickle.loads(call)
            torch.manual_seed(0)
            torch.compiler.reset()
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                modules[path] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
                spec.loader.exec_module(modules[path])  # type: ignore[union-attr]
            outcome = {"result": getattr(modules[path], name)(world, *arguments)}
        except BaseException:
            outcome = {"error": traceback.format_exc()}
        pipe.send_bytes(pickle.dumps(outcome))


def main() -> None:
    """Run a worker."""
    store, pipe, rank, world_size, seconds = sys.argv[1:6]
    faulthandler.enable()
    warnings.simplefilter("error")
    for category in (FutureWarning, DeprecationWarning, UserWarning, RuntimeWarning):
        warnings.filterwarnings("default", category=category, module=r"torch\.")  # of the compiler itself
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, int(world_size)),
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(seconds=float(seconds)),
    )
    serve(Connection(int(pipe)), World(int(rank), int(world_size)))


if __name__ == "__main__":
    main()
