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

_Tensors = Sequence[Tensor]
_Collective = Callable[[_Tensors, _Tensors], None]  # of inputs and outputs


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

        def __init__(self, outputs: Sequence[Tensor], stream: torch.Stream | None) -> None:
            super().__init__()
            self._outputs = list(outputs)
            self._event = None if stream is None else stream.record_event()
            self._device = outputs[0].device

        def wait(self, timeout: Any = None) -> bool:
            if self._event is not None:
                self._event.wait(streams.current_stream(self._device))
            return True

        def is_completed(self) -> bool:
            return True

        def get_future(self) -> Any:
            if self._event is None:
                future = torch.futures.Future()
                future.set_result(self._outputs)
                return future
            future = torch.futures.Future(devices=[self._device])
            with torch.sim.stream(torch.Stream(device=self._device)):
                self.wait()  # whoever waits for the future waits for this stream
                future.set_result(self._outputs)
            return future

    class Group(dist.ProcessGroup):
        """Tensors of a device are counted and checked; those of the CPU go to gloo as they are."""

        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            super().__init__(rank, size)
            self._size = size
            self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
            self._streams: dict[torch.device, torch.Stream] = {}

        def _run(self, name: str, inputs: _Tensors, outputs: _Tensors, collective: _Collective) -> Work:
            """Give CPU copies of inputs and outputs to a collective, and copy the outputs back."""
            every = [*inputs, *outputs]
            device = every[0].device
            if any(t.device != device for t in every):
                raise RuntimeError(f"expected all tensors on the same device, got several devices in {name}")
            if any(not t.is_contiguous() for t in every):
                raise RuntimeError(f"expected contiguous tensors, as NCCL does, got others in {name}")
            if device.type == "cpu":
                collective(inputs, outputs)
                return Work(outputs, None)
            own = self._streams.setdefault(device, torch.Stream(device=device))
            own.wait_stream(streams.current_stream(device))
            with torch.sim.stream(own):
                addresses = [[t.untyped_storage().data_ptr() for t in some] for some in (inputs, outputs)]
                native().launch(name, device.index, *addresses)
                try:
                    with _quiet():
                        results = [t.cpu() for t in outputs]
                        collective([t.cpu() for t in inputs], results)
                        for output, result in zip(outputs, results):
                            output.copy_(result)
                except RuntimeError:
                    own.synchronize()  # nothing is on its way any more
                    raise
            return Work(outputs, own)

        def _all_gathered(self, part: Tensor) -> list[Tensor]:
            parts = [torch.empty_like(part) for _ in range(self._size)]
            self._gloo.allgather([parts], [part]).wait()
            return parts

        def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Work:
            def run(given: _Tensors, results: _Tensors) -> None:
                for result, part in zip(results, self._all_gathered(given[0])):
                    result.copy_(part)

            return self._run("all_gather of a list", inputs, outputs[0], run)

        def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> Work:
            def run(given: _Tensors, results: _Tensors) -> None:
                parts = self._all_gathered(given[0])
                results[0].view(-1).copy_(torch.cat([part.reshape(-1) for part in parts]))

            return self._run("all_gather into a tensor", [input], [output], run)

        all_gather_single = _allgather_base

        def allreduce(self, tensors: Any, opts: Any = None) -> Work:
            def run(given: _Tensors, results: _Tensors) -> None:
                self._gloo.allreduce(results, *_given(opts)).wait()

            return self._run("all_reduce", tensors, tensors, run)

        def broadcast(self, tensors: Any, opts: Any = None) -> Work:
            def run(given: _Tensors, results: _Tensors) -> None:
                self._gloo.broadcast(results, *_given(opts)).wait()

            return self._run("broadcast", tensors, tensors, run)

        def barrier(self, opts: Any = None) -> Any:
            return self._gloo.barrier()

        def getBackendName(self) -> str:
            return BACKEND

        @property
        def supports_splitting(self) -> bool:
            return False

    return Group


def _given(opts: Any) -> tuple[Any, ...]:
    return () if opts is None else (opts,)
