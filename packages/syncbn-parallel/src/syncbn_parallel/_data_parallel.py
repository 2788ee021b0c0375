"""``nn.DataParallel`` on any devices, whose replicas know of each other and fail together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import copy_context
from functools import partial
from types import EllipsisType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._compile import _disable_dynamo

from syncbn_comm import ReplicaGroup
from syncbn_parallel._callbacks import introduce
from syncbn_parallel._devices import as_device
from syncbn_parallel._failures import first_failure, group_of
from syncbn_parallel._replicate import named_submodules, replicate
from syncbn_parallel._scatter_gather import gather, scatter_kwargs
from syncbn_parallel._state import CallerState
from syncbn_parallel._workers import run_all

_M = TypeVar("_M", bound=nn.Module)

# Seconds of a forward from which on it pays to send the caller's OpenMP team to sleep. Shorter ones lose more
# by a core that has to be woken at each hand-off than by one that spins.
_LONG = 1.5e-3

# Seconds that the replicas of the last forward took; not on the model, where nothing of a forward stays.
_took: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


class DataParallelWithCallback(nn.DataParallel[_M]):
    """An ``nn.DataParallel`` on any devices, whose replicas can synchronize.

    Each forward splits the batch over the devices, replicates the module, calls the replication callbacks
    (:func:`execute_replication_callbacks`), runs all replicas at once and joins their outputs. A batch that
    makes a single chunk is run by the module itself, in the calling thread. ``scatter``, ``replicate``,
    ``parallel_apply`` and ``gather`` can be overridden as those of ``nn.DataParallel``; an override of
    ``replicate`` has to call this one, for the sake of the callbacks.

    **Guarantees**

    - If replicas raise, the forward raises the first of their exceptions, the very object, with a note that
      names the replica, its device and the layer. Whoever waits for that replica stops at once, and no
      replica runs on after the forward. The next forward works.
    - The gradients are the same, bit for bit, in every run of the same program, however the threads
      interleave.
    - Replicas work under the caller's grad mode, inference mode, autocast state and context variables, each
      on its share of the caller's intra-op threads. They run on lasting threads; for a given share, there
      are never more of these than replicas have run at once.
    - Any number of threads may run models at once, or one model, as far as the module itself allows it.

    Args:
        module: the module to replicate. Its parameters and buffers have to be on ``device_ids[0]``.
        device_ids: where the replicas go: ``["cpu"] * 4`` is four on the CPU, ``[0, 1]`` two GPUs,
            ``[0, 0]`` two on one GPU. None is all GPUs; on a machine without, the module then runs alone.
        output_device: where the joined output goes; None is ``device_ids[0]``, -1 the CPU.
        dim: the batch dimension.
        timeout: seconds that a replica waits for the others at one place; None waits for ever. Left out, the
            environment variable ``SYNCBN_TIMEOUT``, else 300.

    Raises:
        ValueError: ``device_ids`` is empty, mixes kinds of devices, or names one that is not there;
            ``timeout`` is no positive number.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from syncbn_parallel import DataParallelWithCallback
        >>> model = DataParallelWithCallback(nn.Linear(4, 2), device_ids=["cpu"] * 4)
        >>> model(torch.randn(10, 4)).shape
        torch.Size([10, 2])
    """

    def __init__(
        self,
        module: _M,
        device_ids: Sequence[int | str | torch.device] | None = None,
        output_device: int | str | torch.device | None = None,
        dim: int = 0,
        *,
        timeout: float | EllipsisType | None = ...,
    ) -> None:
        ReplicaGroup(1, timeout)  # to refuse a time-out that makes no sense here, not in the first forward
        devices = None if device_ids is None else _checked(device_ids)
        if devices is None or devices[0].type == "cuda":
            super().__init__(module, devices, dim=dim)
        else:  # nn.DataParallel ignores the ids of other devices, or refuses them
            nn.Module.__init__(self)
            self.module = module
            self.device_ids = devices  # type: ignore[assignment]  # annotated there as numbers of GPUs
            self.src_device_obj = self.output_device = devices[0]  # type: ignore[assignment]
            if len(devices) == 1:
                module.to(devices[0])
        if output_device is not None:
            on_cpu = output_device == -1
            self.output_device = -1 if on_cpu else _checked([output_device])[0]  # type: ignore[assignment]
        self.dim = dim
        self.timeout = timeout

    # The compiler would trace the hand-off between threads. Its public ``disable`` does the same as this, but
    # loads the compiler with this module, a second that only those who train spend anyway.
    @_disable_dynamo
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module on every device's share of the arguments, and join the outputs.

        Raises:
            RuntimeError: the module is not on ``device_ids[0]``, or a backward pass runs this forward.
            ValueError: the arguments cannot be split, or the outputs not be joined.
            Exception: the first that a replica raised.
        """
        if not self.device_ids:
            return self.module(*inputs, **kwargs)
        self._check_module_device()
        rows, kwrows = self.scatter(inputs, kwargs, self.device_ids)
        if not rows and not kwrows:  # a module without arguments runs once
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
        """Return the positional and the keyword arguments of each replica."""
        return scatter_kwargs(inputs, kwargs, list(map(as_device, device_ids)), self.dim)

    def replicate(self, module: _M, device_ids: Sequence[Any]) -> list[_M]:
        """Return the replicas for one forward, after their replication callbacks."""
        devices = list(map(as_device, device_ids))
        replicas = replicate(module, devices)
        introduce(replicas, devices, self.timeout)
        return replicas

    def parallel_apply(self, replicas: Sequence[_M], inputs: Sequence[Any], kwargs: Any) -> list[Any]:
        """Run each replica on its own arguments, all at once, and return their outputs."""
        devices = list(map(as_device, self.device_ids[: len(replicas)]))
        group = group_of(replicas)
        state = CallerState(devices)
        calls = [
            partial(copy_context().run, _run_replica, *one, state, group)
            for one in zip(replicas, inputs, kwargs, devices, strict=True)
        ]
        share = max(1, torch.get_num_threads() // len(self.device_ids))
        # Without gradients there was no backward before this forward, whose team would still spin.
        rest = _took.get(self, 0.0) > _LONG and devices[0].type == "cpu" and torch.is_grad_enabled()
        start = time.perf_counter()
        jobs = run_all(calls, share, on_interrupt=group.abort, rest=rest)
        _took[self] = time.perf_counter() - start
        failure = first_failure([job.take_error() for job in jobs], group)
        if failure is None:
            return [job.result for job in jobs]
        # Its traceback holds the frames of the replicas. What in them leads back to it has to go, or the
        # memory of a failed forward, out-of-memory errors included, would wait for the garbage collector.
        group.forget_failure()
        try:
            raise failure
        finally:
            del failure

    def gather(self, outputs: Any, output_device: Any) -> Any:
        """Join the outputs of the replicas on ``output_device``; -1 is the CPU."""
        return gather(outputs, as_device("cpu" if output_device == -1 else output_device), self.dim)

    def _check_module_device(self) -> None:
        for name, module in named_submodules(self.module):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.device != self.src_device_obj:
                    raise RuntimeError(
                        f"expected the module's parameters and buffers on {self.src_device_obj} "
                        f"(device_ids[0]), got {key!r} of {name or 'the module itself'} on {tensor.device}; "
                        "move the module there first"
                    )


def _run_replica(
    replica: nn.Module,
    inputs: Any,
    kwargs: dict[str, Any],
    device: torch.device,
    state: CallerState,
    group: ReplicaGroup,
) -> Any:
    if not isinstance(inputs, (tuple, list)):  # an override of scatter may leave a tensor bare
        inputs = (inputs,)
    try:
        with state.applied(device):
            return replica(*inputs, **kwargs)
    except BaseException as error:
        group.abort(error)  # news only of a replica that failed outside of its call
        raise


def _checked(device_ids: Sequence[int | str | torch.device]) -> list[torch.device]:
    """Return ``device_ids`` as devices that are there and of one kind.

    Raises:
        ValueError: they are not.
    """
    expected = "expected device_ids to be a list of devices of one kind, such as ['cpu', 'cpu'] or [0, 1]"
    if isinstance(device_ids, str) or not isinstance(device_ids, Sequence) or not device_ids:
        raise ValueError(f"{expected}, got {device_ids!r}")
    try:
        devices = list(map(as_device, device_ids))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{expected}, got {device_ids!r}: {error}") from error
    if len({device.type for device in devices}) > 1:
        raise ValueError(f"{expected}, got {device_ids!r}")
    present = torch.cuda.device_count()
    missing = [str(device) for device in devices if device.type == "cuda" and device.index >= present]
    if missing:
        raise ValueError(
            f"expected devices that are there, got {', '.join(missing)} on a machine with {present} CUDA "
            "devices; replicas on the CPU are device_ids=['cpu', 'cpu']"
        )
    return devices
