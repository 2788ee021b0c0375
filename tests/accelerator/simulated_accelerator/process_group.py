"""A process group between simulated devices, over gloo, in the place of NCCL: the backend ``simccl``.

As with NCCL, a collective runs on a stream of its own, after the current stream, and ``work.wait()`` lets the
current stream wait for it. Other than with NCCL, the host waits for the other processes in the call itself.
That is not counted as a wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simulated_accelerator import streams
from simulated_accelerator.build import native

BACKEND = "simccl"
"""What ``dist.init_process_group`` and ``dist.new_group`` know it by."""


def register() -> None:
    """Make the backend known to ``torch.distributed``, where torch has that."""
    if dist.is_available():
        dist.Backend.register_backend(BACKEND, _create, devices=["sim"])


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return _group_class()(store, rank, size, timeout)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = native().exchange_quiet(True)
    try:
        yield
    finally:
        native().exchange_quiet(before)


def _group_class() -> type:
    class Work(dist._Work):  # type: ignore[misc]
        """A collective that has ended; whoever waits for it makes its current stream wait."""

        def __init__(self, stream: torch.Stream, outputs: Sequence[Tensor]) -> None:
            super().__init__()
            self._event = stream.record_event()
            self._outputs = list(outputs)
            self._device = stream.device

        def wait(self, timeout: Any = None) -> bool:
            self._event.wait(streams.current_stream(self._device))
            return True

        def is_completed(self) -> bool:
            return True

        def get_future(self) -> Any:
            future = torch.futures.Future(devices=[self._device])
            with torch.sim.stream(torch.Stream(device=self._device)):
                self.wait()
                future.set_result(self._outputs)
            return future

    class Group(dist.ProcessGroup):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            super().__init__(rank, size)
            self._size = size
            self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
            self._streams: dict[torch.device, torch.Stream] = {}

        def _run(
            self,
            name: str,
            inputs: Sequence[Tensor],
            outputs: Sequence[Tensor],
            collective: Callable[[list[Tensor], list[Tensor]], None],
        ) -> Work:
            """Give CPU copies of inputs and outputs to a collective, and copy the outputs back."""
            device = outputs[0].device
            if any(t.device != device for t in (*inputs, *outputs)) or device.type != "sim":
                raise RuntimeError(f"expected tensors of one simulated device in {name}, got also others")
            if any(not t.is_contiguous() for t in (*inputs, *outputs)):
                raise RuntimeError(f"expected contiguous tensors in {name}, as NCCL does")
            own = self._streams.setdefault(device, torch.Stream(device=device))
            own.wait_stream(streams.current_stream(device))
            with torch.sim.stream(own):
                addresses = [[t.untyped_storage().data_ptr() for t in some] for some in (inputs, outputs)]
                native().launch(name, device.index, *addresses)
                with _quiet():
                    results = [t.cpu() for t in outputs]
                    collective([t.cpu() for t in inputs], results)
                    for output, result in zip(outputs, results):
                        output.copy_(result)
            return Work(own, outputs)

        def _all_gathered(self, part: Tensor) -> list[Tensor]:
            parts = [torch.empty_like(part) for _ in range(self._size)]
            self._gloo.allgather([parts], [part]).wait()
            return parts

        def allgather(self, outputs: Any, inputs: Any, options: Any = None) -> Work:
            def run(given: list[Tensor], results: list[Tensor]) -> None:
                for result, part in zip(results, self._all_gathered(given[0])):
                    result.copy_(part)

            return self._run("all_gather of a list", inputs, outputs[0], run)

        def _allgather_base(self, output: Tensor, input: Tensor, options: Any = None) -> Work:
            def run(given: list[Tensor], results: list[Tensor]) -> None:
                parts = self._all_gathered(given[0])
                results[0].view(-1).copy_(torch.cat([part.reshape(-1) for part in parts]))

            return self._run("all_gather into a tensor", [input], [output], run)

        all_gather_single = _allgather_base

        def allreduce(self, tensors: Any, options: Any = None) -> Work:
            def run(given: list[Tensor], results: list[Tensor]) -> None:
                self._gloo.allreduce(results, *([options] if options is not None else [])).wait()

            return self._run("all_reduce", tensors, tensors, run)

        def broadcast(self, tensors: Any, options: Any = None) -> Work:
            def run(given: list[Tensor], results: list[Tensor]) -> None:
                self._gloo.broadcast(results, *([options] if options is not None else [])).wait()

            return self._run("broadcast", tensors, tensors, run)

        def barrier(self, options: Any = None) -> Any:
            return self._gloo.barrier()

        def getBackendName(self) -> str:
            return BACKEND

        @property
        def supports_splitting(self) -> bool:
            return False

    return Group
