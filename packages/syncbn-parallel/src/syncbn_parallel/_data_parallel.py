"""``nn.DataParallel`` on any devices, whose replicas know of each other and fail together."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from functools import partial
from itertools import chain
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import nn

from syncbn_parallel._callbacks import introduce
from syncbn_parallel._failures import first_failure, group_of, refuse_backward
from syncbn_parallel._replicate import as_device, replicate
from syncbn_parallel._scatter_gather import gather, scatter_kwargs
from syncbn_parallel._state import CallerState
from syncbn_parallel._workers import run_all

_M = TypeVar("_M", bound=nn.Module)


class DataParallelWithCallback(nn.DataParallel[_M]):
    """An ``nn.DataParallel`` on any devices, whose replicas can synchronize.

    Each forward splits the batch over the devices, replicates the module, calls the replication callbacks
    (``__data_parallel_replicate__``, see :func:`execute_replication_callbacks`), runs the replicas at once and joins their outputs.
    ``scatter``, ``replicate``, ``parallel_apply`` and ``gather`` can be overridden as in ``nn.DataParallel``; an override of
    ``replicate`` has to call this one, for the callbacks.

    **Guarantees**

    - A replica that raises makes the forward raise that very exception, with a note that names the replica, its device and the layer. All replicas that
      wait for it stop at once, and the forward returns when the last one has.
    - The model can be used again after any failure.
    - Gradients are the same, bit for bit, in every run of the same program, however the threads interleave.
    - Several threads may use the same model at once, as far as the model itself allows it.
    - The replicas run on lasting threads, never more than ran at once. They work under the caller's grad mode, inference mode, autocast state
      and context variables, and each on its share of the caller's intra-op threads.

    Args:
        module: the module to replicate. Its parameters and buffers must live on ``device_ids[0]``.
        device_ids: where the replicas go; ``["cpu"] * 4`` for four on the CPU, ``[0, 1]`` for two GPUs, ``[0, 0]`` for two replicas on
            one. None takes all GPUs and, on a machine without, runs the module alone.
        output_device: where the joined output lives; None for ``device_ids[0]``.
        dim: the batch dimension.
        timeout: seconds that a replica waits for the others in one layer; None waits for ever. Left out, the environment variable
            ``SYNCBN_TIMEOUT``, else 300.

    Raises:
        ValueError: ``device_ids`` is empty, mixes kinds of devices or names a device that is not there.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from syncbn_parallel import DataParallelWithCallback
        >>> model = DataParallelWithCallback(nn.Linear(4, 2), device_ids=["cpu"] * 4)
        >>> model(torch.randn(10, 4)).shape
        torch.Size([10, 2])
    """

    timeout: float | EllipsisType | None = ...

    def __init__(
        self,
        module: _M,
        device_ids: Sequence[int | str | torch.device] | None = None,
        output_device: int | str | torch.device | None = None,
        dim: int = 0,
        *,
        timeout: float | EllipsisType | None = ...,
    ) -> None:
        devices = None if device_ids is None else _checked(device_ids)
        if devices is None or devices[0].type == "cuda":
            super().__init__(
                module, devices, None if output_device is None else as_device(output_device), dim
            )
            self.dim = dim  # not set by nn.DataParallel on a machine without a GPU
        else:  # nn.DataParallel itself ignores the ids of other devices, or refuses them
            nn.Module.__init__(self)
            self.module = module
            self.device_ids = devices
            self.src_device_obj = devices[0]
            self.output_device = self.src_device_obj if output_device is None else as_device(output_device)
            self.dim = dim
        self.timeout = timeout

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module on every device's share of the arguments and join the outputs.

        Raises:
            RuntimeError: the module is not on ``device_ids[0]``, or a backward pass makes this call.
            ValueError: the arguments cannot be split, or the outputs not be joined.
            Exception: the first that any replica raised.
        """
        if not self.device_ids:
            return self.module(*inputs, **kwargs)
        refuse_backward()
        self._check_module_device()
        rows, kwrows = self.scatter(inputs, kwargs, self.device_ids)
        if not rows and not kwrows:  # no arguments at all: one call
            rows, kwrows = ((),), ({},)
        if len(rows) > 1:
            replicas = self.replicate(self.module, self.device_ids[: len(rows)])
            outputs = self.parallel_apply(replicas, rows, kwrows)
        else:
            outputs = [self.module(*rows[0], **kwrows[0])]
            if len(self.device_ids) == 1:
                return outputs[0]
        return self.gather(outputs, self.output_device)

    def scatter(
        self, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None, device_ids: Sequence[Any]
    ) -> Any:
        """Split the arguments over ``device_ids``; see ``nn.DataParallel``."""
        return scatter_kwargs(inputs, kwargs, list(map(as_device, device_ids)), self.dim)

    def replicate(self, module: _M, device_ids: Sequence[Any]) -> list[_M]:
        """Make the replicas of one forward, and call their replication callbacks."""
        devices = list(map(as_device, device_ids))
        replicas = replicate(module, devices)
        introduce(replicas, devices, self.timeout)
        return replicas

    def parallel_apply(self, replicas: Sequence[_M], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """Run every replica on its own arguments, at once."""
        devices = list(map(as_device, self.device_ids[: len(replicas)]))
        group = group_of(replicas)
        state = CallerState(devices)
        calls = [
            partial(contextvars.copy_context().run, _run_replica, replica, own, kw, device, state)
            for replica, own, kw, device in zip(replicas, inputs, kwargs, devices, strict=True)
        ]
        share = max(1, torch.get_num_threads() // len(self.device_ids))
        jobs = run_all(calls, share, on_interrupt=group.abort)
        failure = first_failure([job.error for job in jobs], group)
        if failure is not None:
            raise failure
        return [job.result for job in jobs]

    def gather(self, outputs: Any, output_device: Any) -> Any:
        """Join the outputs of the replicas on ``output_device``; see ``nn.DataParallel``."""
        # nn.DataParallel's own way to say "the CPU" is -1.
        return gather(
            outputs, torch.device("cpu") if output_device == -1 else as_device(output_device), self.dim
        )

    def _check_module_device(self) -> None:
        for name, tensor in chain(self.module.named_parameters(), self.module.named_buffers()):
            if tensor.device != self.src_device_obj:
                raise RuntimeError(
                    f"expected all parameters and buffers of the module on {self.src_device_obj} (device_ids[0]), "
                    f"got {name!r} on {tensor.device}; move the module there first"
                )


def _checked(device_ids: Sequence[int | str | torch.device]) -> list[torch.device]:
    """Return ``device_ids`` as devices that exist and are of one kind."""
    if isinstance(device_ids, (str, bytes)) or not isinstance(device_ids, Sequence) or not device_ids:
        raise ValueError(
            f"expected device_ids to be a non-empty list of devices, such as ['cpu', 'cpu'] or [0, 1], got {device_ids!r}"
        )
    try:
        devices = list(map(as_device, device_ids))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected device_ids to name devices of this machine, got {device_ids!r}: {error}"
        ) from error
    kinds = sorted({device.type for device in devices})
    if len(kinds) > 1:
        raise ValueError(
            f"expected device_ids of one kind of device, got {' and '.join(kinds)} in {device_ids!r}"
        )
    missing = [d for d in devices if d.type == "cuda" and not 0 <= d.index < torch.cuda.device_count()]
    if missing:
        raise ValueError(
            f"expected device_ids to name devices of this machine, which has {torch.cuda.device_count()} CUDA devices, "
            f"got {', '.join(map(str, missing))} in {device_ids!r}; for replicas on the CPU, say ['cpu'] * {len(devices)}"
        )
    return devices


def _run_replica(
    replica: nn.Module, inputs: Any, kwargs: dict[str, Any], device: torch.device, state: CallerState
) -> Any:
    with state.applied(device):
        return replica(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)), **kwargs)
