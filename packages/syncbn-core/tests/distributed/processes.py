"""Worker processes of one gloo group that are kept, and helpers for the functions that run in them.

A test calls a function of its own file in every process at once. The processes of one size stay for the whole
session, since each takes seconds to import torch. If a call fails, they are ended, and the next test gets new
ones. Every wait has a limit.

The file has both sides: the tests load it for `Processes`, and each worker runs it as a program. Other tests
build on it: they load it too, and give `Processes` a program of their own, which calls `work`.
"""

import faulthandler
import importlib.util
import os
import pickle
import random
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

CALL_SECONDS = 100.0
GROUP_SECONDS = 60.0


class Processes:
    """Worker processes, as the tests see them.

    Args:
        world_size: how many.
        group_seconds: the timeout of their collectives.
        environment: further environment variables for them.
        call_seconds: how long a call may take.
        program: what each of them runs.
    """

    def __init__(
        self,
        world_size: int,
        group_seconds: float = GROUP_SECONDS,
        environment: dict[str, str] | None = None,
        call_seconds: float = CALL_SECONDS,
        program: str = __file__,
    ) -> None:
        self._call_seconds = call_seconds
        self._folder = tempfile.TemporaryDirectory()
        self._workers: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if sys.platform == "linux":
            settings["GLOO_SOCKET_IFNAME"] = "lo"
        for rank in range(world_size):
            ours, theirs = Pipe()
            place = [str(theirs.fileno()), str(rank), str(world_size), str(group_seconds), self._folder.name]
            worker = subprocess.Popen(
                [sys.executable, program, *place],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **settings, **(environment or {})},
            )
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(world, *arguments)`` in all of them; return results or tracebacks, in rank order.

        The workers call the function of the same name in the same file. The outcome is None if a worker has
        none in time, or has ended.
        """
        call = pickle.dumps((function.__code__.co_filename, function.__qualname__, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        return [self._outcome(pipe) for pipe in self._pipes]

    def _outcome(self, pipe: Connection) -> Any:
        try:
            return pickle.loads(pipe.recv_bytes()) if pipe.poll(self._call_seconds) else None
        except (EOFError, ConnectionError):
            return None

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(world, *arguments)`` in all of them; return what they return, in rank order."""
        outcomes = self.outcomes(function, *arguments)
        failures = [
            f"process {rank}: {'no answer' if outcome is None else outcome['error']}"
            for rank, outcome in enumerate(outcomes)
            if outcome is None or "error" in outcome
        ]
        if failures:
            self.end()
            raise AssertionError("\n".join(failures))
        return [outcome["result"] for outcome in outcomes]

    @property
    def ended(self) -> bool:
        """Whether the processes have been ended."""
        return not self._pipes

    def end(self) -> None:
        """End the processes, whatever they do."""
        for worker in self._workers:
            worker.kill()
            worker.wait(self._call_seconds)
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []
        self._folder.cleanup()


class Branches(nn.Module):
    """Three parallel branches of different widths behind one layer, joined by a sum; in float64.

    Args:
        norm: makes a batch norm of so many channels.
        device: of its parameters.
    """

    def __init__(self, norm: Callable[[int], nn.Module], device: str) -> None:
        super().__init__()
        self.stem = norm(4)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, width, 1), norm(width), nn.Tanh(), nn.Conv2d(width, 4, 1))
            for width in (2, 3, 5)
        )
        self.to(device, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        return sum((branch(stem) for branch in self.branches), stem)


class World:
    """The first argument of a function that runs in a worker."""

    Branches = Branches

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def share(self, whole: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return this process's rows of the whole batch; without sizes, all have the same number."""
        return whole.split(sizes if sizes is not None else len(whole) // self.size)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def total_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the gradients that a single process would have, by the names of the parameters."""
        return {
            name: self.total(torch.zeros_like(p) if p.grad is None else p.grad)
            for name, p in model.named_parameters()
        }

    def assert_equals_whole_batch(
        self,
        model: nn.Module,
        twin: nn.Module,
        whole: Tensor,
        sizes: Sequence[int] | None = None,
        intercepted: bool = False,
        **tolerance: float,
    ) -> None:
        """Train a step on this share, and a twin on the whole batch; compare all results. For a wrapped
        model, these are the gradients and buffers of its module. Every output has another weight in the loss,
        because the gradient of a batch norm's plain sum is zero. If saved tensors are intercepted, a layer
        has three nodes instead of one.
        """
        model.zero_grad()
        twin.zero_grad()
        x = self.share(whole, sizes).clone(memory_format=torch.preserve_format).requires_grad_()
        whole = whole.clone(memory_format=torch.preserve_format).requires_grad_()
        with saved_tensors_hooks(_same, _same) if intercepted else nullcontext():
            y = model(x)
        expected = twin(whole)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
        (y * self.share(weights, sizes)).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(y, self.share(expected, sizes), **tolerance)
        torch.testing.assert_close(x.grad, self.share(whole.grad, sizes), **tolerance)
        model = getattr(model, "module", model)
        gradients = {name: p.grad for name, p in twin.named_parameters()}
        torch.testing.assert_close(self.total_gradients(model), gradients, **tolerance)
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), **tolerance)

    def shuffle_sequence(self, root: Tensor, seed: int) -> int:
        """Give the Merge nodes of a graph random sequence numbers, by process; return their count."""
        draw = random.Random(f"{self.rank} {seed}")
        merges = [node for node in nodes_behind(root) if hasattr(node, "chain")]
        for node in merges:
            node._set_sequence_nr(draw.randrange(10**6))  # type: ignore[attr-defined]
        return len(merges)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Count this process's calls of the collectives of torch.distributed, by name."""
        calls: Counter[str] = Counter()

        def counting(name: str) -> Callable[..., Any]:
            original = getattr(dist, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                calls[name] += 1
                return original(*args, **kwargs)

            return call

        prefixes = ("all_", "broadcast", "reduce_scatter", "gather", "scatter", "barrier", "send", "recv")
        names = [name for name in vars(dist) if name.startswith(prefixes)] + ["reduce", "isend", "irecv"]
        with mock.patch.multiple(dist, **{name: counting(name) for name in names}):
            yield calls


def _same(tensor: Tensor) -> Tensor:
    return tensor


def nodes_behind(root: Tensor) -> list[Node]:
    """Every autograd node that a tensor depends on."""
    seen: set[Node] = set()
    ahead = [root.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [behind for behind, _ in node.next_functions]
    return list(seen)


def serve(pipe: Connection, world: World, prepare: Callable[[], None]) -> None:
    """Run functions as they are requested, each after `prepare`, until the requests end."""
    modules: dict[str, Any] = {}
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            path, name, arguments = pickle.loads(call)
            torch.manual_seed(0)
            prepare()
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                modules[path] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
                spec.loader.exec_module(modules[path])  # type: ignore[union-attr]
            outcome = {"result": getattr(modules[path], name)(world, *arguments)}
        except BaseException:
            outcome = {"error": traceback.format_exc()}
        pipe.send_bytes(pickle.dumps(outcome))


def work(world: type[World] = World, prepare: Callable[[], None] = lambda: None) -> None:
    """Run a worker, whose place is in the arguments of the program.

    Args:
        world: the class of the functions' first argument.
        prepare: called before each function.
    """
    pipe, rank, world_size = (int(argument) for argument in sys.argv[1:4])
    seconds, folder = float(sys.argv[4]), Path(sys.argv[5])
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )
    serve(Connection(pipe), world(rank, world_size), prepare)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("default", category=FutureWarning, module=r"torch\.")  # torch 2.4, of itself
    work()
