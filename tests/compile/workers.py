"""Worker processes of one gloo group that compile models; both sides of them.

They are those of syncbn-core's tests. The tests load this file for `Workers`, and each worker runs it as a
program.
"""

import runpy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

CALL_SECONDS = 300.0  # Inductor's C++ compiler is slow on a busy machine

_core = Path(__file__).parents[2] / "packages" / "syncbn-core" / "tests" / "distributed" / "processes.py"
processes = runpy.run_path(str(_core))


class Workers(processes["Processes"]):
    """Worker processes, as the tests see them.

    Args:
        world_size: how many.
        cache: a folder for the compiler's cache.
        group_seconds: the timeout of their collectives.
    """

    def __init__(self, world_size: int, cache: Path, group_seconds: float = 60.0) -> None:
        settings = {
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of further processes
        }
        super().__init__(world_size, group_seconds, settings, CALL_SECONDS, __file__)


class World(processes["World"]):
    """The first argument of a function that runs in a worker."""

    def assert_compiled_equals_whole_batch(
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


if __name__ == "__main__":
    warnings.simplefilter("error")
    for category in (FutureWarning, DeprecationWarning, UserWarning, RuntimeWarning):
        warnings.filterwarnings("default", category=category, module=r"torch\.")  # of the compiler itself
    processes["work"](World, torch.compiler.reset)
