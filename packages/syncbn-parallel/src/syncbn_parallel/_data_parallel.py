"""An ``nn.DataParallel`` for any devices, whose replicas can synchronize and fail together."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from functools import partial
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import nn

from syncbn_comm import ReplicaGroup
from syncbn_parallel._assignments import carry_assignments_over
from syncbn_parallel._callbacks import introduce
from syncbn_parallel._caller_state import CallerState
from syncbn_parallel._compiler import outside_of_the_compiler
from syncbn_parallel._devices import all_accelerators, as_device, checked_devices
from syncbn_parallel._gather import gather
from syncbn_parallel._hints import warn_of_local_batch_norms, warn_of_no_devices
from syncbn_parallel._in_place_changes import InputChanges, SharedTensorChanges
from syncbn_parallel._membership import ReplicaForward, first_failure, forward_of
from syncbn_parallel._module_tree import named_submodules
from syncbn_parallel._refusals import refuse_transforms
from syncbn_parallel._replicate import replicate
from syncbn_parallel._scatter import scatter_kwargs
from syncbn_parallel._workers import run_all

_M = TypeVar("_M", bound=nn.Module)


class DataParallelWithCallback(nn.DataParallel[_M]):
    """An ``nn.DataParallel`` for any devices, whose replicas can synchronize.

    Each forward splits the batch over the devices, replicates the module, calls the replication callbacks
    (:func:`execute_replication_callbacks`), runs all replicas at once and joins their outputs. If the batch
    makes a single chunk, the module itself runs it, in the calling thread. ``scatter``, ``replicate``,
    ``parallel_apply`` and ``gather`` can be overridden as those of ``nn.DataParallel``. An override of
    ``replicate`` has to call this one, which calls the callbacks.

    **Guarantees**

    - If replicas raise, the forward raises the first of their exceptions, the same object, with a note that
      names the replica, its device and the layer. Replicas that wait for the failed one stop at once, and no
      replica runs on after the forward. The next forward works.
    - The gradients are the same, bit for bit, in every run of the same program, in whatever order the threads
      run.
    - Replicas work under the caller's grad mode, inference mode, autocast state, streams, context variables,
      torch function and dispatch modes and (from torch 2.8 on) hooks on saved tensors, each on its share of
      the caller's intra-op threads. They run on threads that are kept. For a given share, there
      are never more threads than replicas have run at once.
    - Cases that would give wrong results are errors: a forward inside a backward pass or inside a function
      transform (``torch.func``), and a parameter that the forward changes in place while replicas share it.
    - Buffers that the forward assigns, and numbers on which all replicas agree, reach the module.
    - Any number of threads may run models at once, and even the same model, if the module itself allows it.

    Args:
        module: the module to replicate. Its parameters and buffers have to be on ``device_ids[0]``.
        device_ids: the device of each replica: ``["cpu"] * 4`` is four on the CPU, ``[0, 1]`` two GPUs,
            ``[0, 0]`` two on one GPU. A number is a device of the machine's accelerator (CUDA, XPU, or one
            that a backend adds to torch). None means all of these; on a machine without an accelerator,
            the module runs without replicas, with a warning.
        output_device: the device of the joined output; None is ``device_ids[0]``, -1 the CPU.
        dim: the batch dimension.
        timeout: seconds that a replica waits for the others at one place; None waits forever. The default is
            the environment variable ``SYNCBN_TIMEOUT`` (seconds, or ``none``), or 300 if it is not set.

    Raises:
        ValueError: ``device_ids`` is empty, mixes kinds of devices, or names one that is not there;
            ``timeout`` is not a positive number of seconds.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from syncbn_parallel import DataParallelWithCallback
        >>> model = DataParallelWithCallback(nn.Linear(4, 2), device_ids=["cpu"] * 4)
        >>> model(torch.randn(10, 4)).shape
        torch.Size([10, 2])
    """

    __module__ = "syncbn_parallel"  # where users import it from, for pickles and messages

    def __init__(
        self,
        module: _M,
        device_ids: Sequence[int | str | torch.device] | None = None,
        output_device: int | str | torch.device | None = None,
        dim: int = 0,
        *,
        timeout: float | EllipsisType | None = ...,
    ) -> None:
        ReplicaGroup(1, timeout)  # refuses a bad timeout here, not in the first forward
        devices = all_accelerators() if device_ids is None else checked_devices(device_ids)
        if not devices:
            warn_of_no_devices()
        if devices and devices[0].type == "cuda":
            super().__init__(module, devices, dim=dim)
        else:  # nn.DataParallel ignores the ids of other devices, or refuses them
            nn.Module.__init__(self)
            self.module = module
            self.device_ids = devices  # type: ignore[assignment]  # annotated there as numbers of GPUs
            if devices:
                self.src_device_obj = self.output_device = devices[0]  # type: ignore[assignment]
            if len(devices) == 1:
                module.to(devices[0])
        if output_device is not None:
            on_cpu = output_device == -1
            self.output_device = -1 if on_cpu else checked_devices([output_device])[0]  # type: ignore[assignment]
        self.dim = dim
        self.timeout = timeout

    def extra_repr(self) -> str:
        """Show the devices, the batch dimension and the timeout."""
        shown = [f"device_ids={[str(as_device(device)) for device in self.device_ids]}"]
        if self.device_ids:
            shown.append(
                f"output_device={'cpu' if self.output_device == -1 else str(as_device(self.output_device))!r}"
            )
        shown.append(f"dim={self.dim}")
        if self.timeout is not ...:
            shown.append(f"timeout={self.timeout}")
        return ", ".join(shown)

    @outside_of_the_compiler
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module on every device's share of the arguments, and join the outputs.

        Raises:
            RuntimeError: the module is not on ``device_ids[0]``; a backward pass or a function transform runs
                this forward; or the forward has changed a parameter in place that replicas share.
            ValueError: the arguments cannot be split, or the outputs cannot be joined.
            Exception: the first that a replica raised.
        """
        if not self.device_ids:
            return self.module(*inputs, **kwargs)
        if len(self.device_ids) > 1:
            refuse_transforms()
        modules = named_submodules(self.module)
        self._check_module_device(modules)
        rows, kwrows = self.scatter(inputs, kwargs, self.device_ids)
        if not rows and not kwrows:  # a module without arguments runs once
            rows, kwrows = ((),), ({},)
        if len(rows) > 1:
            warn_of_local_batch_norms(self, modules)
            changes = InputChanges((inputs, kwargs), list(zip(rows, kwrows)))
            replicas = self.replicate(self.module, self.device_ids[: len(rows)])
            outputs = self.parallel_apply(replicas, rows, kwrows)
            changes.carry_over(self.dim)
            carry_assignments_over(modules, replicas)
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
        forward = forward_of(replicas)
        state = CallerState(devices)
        calls = [
            partial(copy_context().run, _run_replica, *one, state, forward)
            for one in zip(replicas, inputs, kwargs, devices, strict=True)
        ]
        changes = SharedTensorChanges(self, replicas, devices)
        share = max(1, torch.get_num_threads() // len(self.device_ids))
        try:
            jobs = run_all(calls, share, on_interrupt=forward.abort)
        finally:
            forward.end()
        group = forward.group
        failure = first_failure([job.take_error() for job in jobs], group)
        if failure is None:
            changes.refuse()
            changes.warn_of_containers()
            return [job.result for job in jobs]
        # Its traceback holds the frames of the replicas. These must not refer back to the error. Otherwise
        # the memory of a failed forward, as after an out-of-memory error, stays until the garbage collector
        # runs.
        group.forget_failure()
        try:
            raise failure
        finally:
            del failure

    def gather(self, outputs: Any, output_device: Any) -> Any:
        """Join the outputs of the replicas on ``output_device``; -1 is the CPU."""
        return gather(outputs, as_device("cpu" if output_device == -1 else output_device), self.dim)

    def _check_module_device(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        for name, module in modules:
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
    forward: ReplicaForward,
) -> Any:
    if not isinstance(inputs, (tuple, list)):  # an override of scatter may leave a tensor bare
        inputs = (inputs,)
    try:
        with state.applied(device):
            return replica(*inputs, **kwargs)
    except BaseException as error:
        forward.abort(error)  # changes nothing, unless the replica failed outside of its call
        raise
