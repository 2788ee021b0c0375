"""What the synchronized layers have in common: options, checks, and which way a call takes.

::

    forward ──► alone, or in evaluation: torch.nn.functional.batch_norm
            ──► _forward_composite: plain operations (fused=False)
            ──► _forward_one_node: one autograd node for all replicas
            ──► _forward_three_nodes: where something intercepts what is saved for backward, and for overrides

The replicas meet in `_master`, which runs in the thread of replica 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_unary

from syncbn_comm import current_replica
from syncbn_core import _compiled
from syncbn_core._autograd import one_node, three_nodes
from syncbn_core._autograd.gradients import refuse_inside_forward
from syncbn_core._kernels import kernels_of, plain
from syncbn_core._kernels.protocol import Reduction, RunningStatistics
from syncbn_core._kernels.statistics import (
    compute_dtype,
    local_statistics,
    merge_statistics,
    samples_per_channel,
    whole_batch,
)
from syncbn_core._kernels.streams import current_stream, keep_for, wait_for
from syncbn_core._options import EpsMode, check_eps_mode, clamps
from syncbn_core._processes.backward_order import chain_of
from syncbn_core._processes.collectives import Processes, are_several
from syncbn_core._replicas.place import Message
from syncbn_core._replicas.recomputation import in_backward, may_be_intercepted
from syncbn_core._replicas.replication import ReplicatedLayer
from syncbn_core._replicas.stock_data_parallel import in_a_stock_replica


class _SynchronizedBatchNorm(ReplicatedLayer, _BatchNorm):
    """What the synchronized layers have in common, with the override points of a fork.

    Every attribute beyond those of ``nn.BatchNorm*d`` has a default on the class, so that an
    ``nn.BatchNorm2d`` becomes a ``SynchronizedBatchNorm2d`` when only its class changes.
    """

    eps_mode: EpsMode | None = None
    fused: bool = True

    _dims: tuple[int, ...] = (2, 3, 4, 5)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: Any = None,
        eps_mode: EpsMode | None = None,
        fused: bool = True,
        bias: bool = True,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"expected num_features of at least 1, got {num_features}")
        if device is not None and not isinstance(device, (torch.device, str, int)):
            device, process_group = None, device  # nn.SyncBatchNorm has its process_group in this place
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # an argument that torch's own layers have in its later versions
            self.register_parameter("bias", None)
        self.process_group = process_group
        self.eps_mode = None if eps_mode is None else check_eps_mode(eps_mode)
        self.fused = fused

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``, ``(N, C, *)``; in training by the statistics of all replicas' batches."""
        self._check_input(input)
        if torch.compiler.is_compiling() and _compiled.is_traceable(self):
            return _compiled.forward(self, input)
        synchronizes = self.training and self._synchronizes()
        clamped = clamps(self.eps_mode, synchronizes)
        if not synchronizes and not clamped:
            return super().forward(input)
        if not self.training and (self.running_mean is not None or self.running_var is not None):
            return self._forward_running(input)
        if torch.compiler.is_compiling():  # a graph break: no graph holds what other threads do
            result: Tensor = _forward_outside_of_graphs(self, input, synchronizes)
            return result
        # A subclass of Tensor: the output is what the subclass makes of it.
        if has_torch_function_unary(input):
            wrapped: Tensor = handle_torch_function(_forward_training, (input,), self, input, synchronizes)
            return wrapped
        return _forward_training(self, input, synchronizes)

    def _synchronizes(self) -> bool:
        """Whether a call in training synchronizes over replicas or processes.

        Raises:
            RuntimeError: a replica has called a layer that is not its own, such as that of the replicated
                model.
        """
        group = self._group()
        replica = current_replica()
        if replica is not None:
            is_own = replica.group is group and self._own_place().rank == replica.rank
            if not is_own and replica.group.world_size > 1:
                raise self._not_own(f"replica {replica.rank} (of 0 to {replica.group.world_size - 1})")
        elif group is None and not torch.compiler.is_compiling() and self._is_out_of_place():
            raise self._not_own("a replica")
        return group is not None or are_several(self.process_group, self._where())

    def _is_out_of_place(self) -> bool:
        """Whether a replica of an ``nn.DataParallel`` calls this layer, which is no replica."""
        return "_is_replica" not in self.__dict__ and in_a_stock_replica()

    def _not_own(self, replica: str) -> RuntimeError:
        return RuntimeError(
            f"expected {replica} to call its own copy of {self._where()!r}, got a call of a layer that is "
            "not part of this replica, so it cannot synchronize. The code reaches the layer without the "
            "replica: by a global variable, or an attribute of another object. Use an attribute of the "
            "module, such as self.bn. If the layer is not to be trained, put it into evaluation mode"
        )

    def _forward_running(self, input: Tensor) -> Tensor:
        """Normalize by the running statistics where eps is their floor."""
        var = self.running_var.clamp(min=self.eps)  # type: ignore[union-attr]
        # nn.functional.batch_norm refuses an eps of 0 before torch 2.13.
        parameters = self.weight, self.bias, self.running_mean
        return torch.batch_norm(input, *parameters, var, False, 0.0, 0.0, torch.backends.cudnn.enabled)

    def _forward_composite(self, input: Tensor, synchronizes: bool) -> Tensor:
        # To float32 once: the gradients of both uses are added before they are rounded to halves.
        x = input.to(compute_dtype(input.dtype))
        message = self._message(torch.stack(local_statistics(x)), x, input.dtype)
        mean, invstd = self._agree(message, synchronizes).unbind()
        y = plain.normalize(x, mean, invstd, self.weight, self.bias).to(input.dtype)
        if synchronizes and y.grad_fn is not None:
            is_running, name = self._own_place().watch(), self._where()
            y.grad_fn.register_prehook(lambda grads: refuse_inside_forward(is_running, name))
        return y

    def _forward_one_node(self, x: Tensor) -> Tensor | None:
        """Return the output; None if the replicas have to meet again, since others use three nodes."""
        place = self._own_place()
        several = place.group is not None
        share = one_node.enter(x, self.weight, self.bias, self.eps, several=several)
        output: one_node.Output | None = place.meet(share, self._master)
        return None if output is None else one_node.leave(output, share)

    def _forward_three_nodes(self, x: Tensor, synchronizes: bool) -> Tensor:
        name = self._where()
        x, statistics = three_nodes.gather(x, self.eps, name)
        agreed = self._agree(self._message(statistics, x, x.dtype), synchronizes)
        return three_nodes.apply(x, agreed, self.weight, self.bias, name)

    def _message(self, statistics: Tensor, x: Tensor, dtype: torch.dtype) -> Message:
        stream = current_stream(x.device)
        return Message(statistics, samples_per_channel(x), dtype, stream, torch.is_grad_enabled())

    def _has_own(self, method: str) -> bool:
        """Whether a method is the one of this module, not of a subclass or set on the object."""
        own = getattr(_SynchronizedBatchNorm, method)
        return method not in self.__dict__ and getattr(type(self), method) is own

    def _takes_one_node(self) -> bool:
        """Whether one node is enough: no checkpoint or hook intercepts this call, and nothing is overridden.

        This thread is not always the one that saves tensors for backward.
        """
        return (
            not self._own_place().nested
            and self._has_own("_data_parallel_master")
            and torch.is_grad_enabled()
            and not in_backward()
            and not may_be_intercepted()
        )

    def _agree(self, message: Message, synchronizes: bool) -> Tensor:
        """Return the mean and invstd to normalize with, ``(2, C)``; see `_data_parallel_master`."""
        if not synchronizes:
            return self._data_parallel_master([(0, message)])[0][1]
        return self._own_place().agree(message, self._master, recomputable=self.fused)

    def _master(self, intermediates: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Answer the messages of all replicas; runs in the thread of replica 0.

        Returns:
            For every `Message`, the mean and invstd; for every `one_node.Share`, the output. None for all
            replicas if the messages are of both kinds: then all of them send a `Message`.
        """
        ranks, messages = zip(*intermediates)
        kinds = set(map(type, messages))
        own_streams = [wait_for(message.stream) for message in messages]
        answers: list[tuple[int, Any]]
        if kinds == {Message}:
            # Replica 0 may be in no_grad while others need the graph.
            with torch.set_grad_enabled(any(message.in_grad_mode for message in messages)):
                answers = self._data_parallel_master(intermediates)
        elif kinds == {one_node.Share} and len({share.x.dtype for share in messages}) == 1:
            how = self._reduction(messages[0].x, messages[0].x.dtype)
            answers = list(zip(ranks, one_node.reduce(messages, how)))
        else:
            return [(rank, None) for rank in ranks]
        for message, (_, answer), own_stream in zip(messages, answers, own_streams):
            if own_stream is not None:
                keep_for(message.tensor, own_stream)
                keep_for(answer if isinstance(answer, Tensor) else answer.y, message.stream)
                message.stream.wait_stream(own_stream)
        return answers

    def _data_parallel_master(self, intermediates: Sequence[tuple[int, Message]]) -> list[tuple[int, Tensor]]:
        """Reduce the statistics of all replicas; runs once per call of the layer, in the thread of replica 0.

        Args:
            intermediates: ``[(0, message), (1, message), ...]``.

        Returns:
            ``[(0, agreed), (1, agreed), ...]``: mean and invstd to normalize with, ``(2, C)``, on the
            replica's own device.

        Raises:
            TypeError: the replicas' inputs differ in dtype.
            ValueError: there is one value per channel in all replicas together, which has no variance.
            BrokenSyncError: another process failed or did not arrive.
        """
        ranks, messages = zip(*intermediates)
        dtypes = {message.dtype for message in messages}
        if len(dtypes) > 1:
            got = ", ".join(f"{m.dtype} in replica {rank}" for rank, m in intermediates)
            raise TypeError(f"expected inputs of one dtype in all replicas at {self._where()!r}, got {got}")
        counts = [message.samples for message in messages]
        parts = [message.statistics for message in messages]
        how = self._reduction(parts[0], dtypes.pop())
        merge = three_nodes.merge if self.fused else self._merge_composite
        return list(zip(ranks, merge(parts, counts, how)))

    def _merge_composite(
        self, parts: Sequence[Tensor], counts: Sequence[int], how: Reduction
    ) -> Sequence[Tensor]:
        home, count = parts[0].device, sum(counts)
        pairs = [(part[0], part[1]) for part in (part.to(home, non_blocking=True) for part in parts)]
        mean, m2 = merge_statistics(pairs, counts)
        total: int | Tensor = count
        if isinstance(how.processes, Processes):
            mean, m2, total = how.processes.merge_with_gradient(mean, m2, count)
        whole = whole_batch(mean, m2, total, count, how)
        agreed = torch.stack([whole.mean, whole.invstd])
        return [agreed.to(part.device, non_blocking=True) for part in parts]

    def _reduction(self, first: Tensor, dtype: torch.dtype) -> Reduction:
        """Describe the reduction of one call; ``first`` is what replica 0 has brought."""
        group = self._group()
        processes = None
        if self.training and are_several(self.process_group, self._where()):
            processes = Processes(self.process_group, self._name_in_all_processes(), self._own_calls())
        clamped = clamps(self.eps_mode, processes is not None or group is not None)
        is_own = self._has_own("_compute_mean_std")
        return Reduction(
            dtype=compute_dtype(dtype),
            eps=self.eps,
            clamps=clamped,
            finish=self._compute_mean_std if is_own else self._compute_mean_std_and_carry_back,
            move=self._move_running_statistics,
            is_standard=is_own and self._has_own("_move_running_statistics") and not clamped,
            running=self._running_statistics(),
            processes=processes,
            chain=chain_of(first, group) if processes is not None else None,
            is_running=self._own_place().watch(),
            weight=self.weight,
            bias=self.bias,
            name=self._where(),
        )

    def _compute_mean_std(self, mean: Tensor, m2: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        """Update the running statistics, and return the mean and invstd to normalize with.

        An override may assign to buffers and attributes (``self.running_mean = ...``): the new values are
        copied to the layer of the replicated model. An override that normalizes by another formula
        needs ``fused=False``, since the fused backward is that of this formula.

        Args:
            mean: ``(C,)``, of the whole batch.
            m2: ``(C,)``, the sum of squared deviations from the mean.
            count: the number of samples per channel. Over several processes it may be a tensor, ``(1,)``.

        Returns:
            mean and invstd, ``(C,)`` each.
        """
        self._move_running_statistics(mean.detach(), m2.detach() / (count - 1))
        var = m2 / count
        # In mode "clamp_synchronized", only calls that synchronize come here.
        if clamps(self.eps_mode, synchronizes=True):
            return mean, var.clamp(min=self.eps).rsqrt()
        return mean, (var + self.eps).rsqrt()

    def _compute_mean_std_and_carry_back(
        self, mean: Tensor, m2: Tensor, count: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        with self._carrying_back():
            return self._compute_mean_std(mean, m2, count)

    def _move_running_statistics(self, mean: Tensor, unbiased_var: Tensor) -> None:
        running = self._running_statistics()
        if running is None:
            return
        step: Any = running.momentum
        with torch.no_grad():
            if running.num_batches_tracked is not None:
                running.num_batches_tracked.add_(1)
                if step is None:  # the cumulative average; the counter may be on a GPU, so it is not read
                    step = 1.0 / running.num_batches_tracked.to(mean.dtype)
            for moved, new in ((running.mean, mean), (running.var, unbiased_var)):
                # In place: the buffers of replica 0 are the model's own storage.
                moved.lerp_(_as(moved, new), _as(moved, step) if isinstance(step, Tensor) else step)

    def _running_statistics(self) -> RunningStatistics | None:
        """Return the running statistics that this call has to update, if any."""
        mean, var = self.running_mean, self.running_var
        if not (self.training and self.track_running_stats) or mean is None or var is None:
            return None
        tracked, momentum = self.num_batches_tracked, self.momentum
        if momentum is None and tracked is None:
            momentum = 0.0  # as in torch's own layer without a counter
        return RunningStatistics(mean, var, tracked, momentum)

    def reset_parameters(self) -> None:
        """Reset the running statistics, and weight and bias to 1 and 0."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0, the running variance to 1, and the counter of batches to 0."""
        super().reset_running_stats()

    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(_compiled.not_a_tensor(input, self._where()))
        self._check_input_dim(input)
        # A layer that was pruned by hand may have fewer channels than num_features.
        vector = self.weight if self.weight is not None else self.running_mean
        channels = self.num_features if vector is None else vector.shape[0]
        if input.shape[1] != channels:
            raise ValueError(
                f"expected {channels} channels (num_features) at {self._where()!r}, got "
                f"{input.shape[1]} in an input of shape {tuple(input.shape)}"
            )
        if not input.is_floating_point():
            raise TypeError(f"expected a floating-point input at {self._where()!r}, got {input.dtype}")

    def _check_arithmetic(self, input: Tensor) -> None:
        """Refuse what torch's own layer refuses in training."""
        if self.eps <= 0:
            raise ValueError(
                f"batch_norm eps must be positive during training, but got {self.eps} at {self._where()!r}"
            )
        allowed = (input.dtype, compute_dtype(input.dtype))
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = self._parameters.get(name, self._buffers.get(name))
            if tensor is not None and tensor.dtype not in allowed:
                raise RuntimeError(
                    f"expected an input of the dtype of {name!r} at {self._where()!r} ({tensor.dtype}), or "
                    f"a half type with parameters of torch.float32, got {input.dtype}: convert the input or "
                    "the layer"
                )

    def _check_input_dim(self, input: Tensor) -> None:
        if not self._dims[0] <= input.dim() <= self._dims[-1]:
            dims = " or ".join(f"{d}D" for d in self._dims)
            raise ValueError(
                f"expected {dims} input at {self._where()!r}, got {input.dim()}D input of shape "
                f"{tuple(input.shape)}"
            )

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults, after those of torch's own layer."""
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        parts += [f"eps_mode={self.eps_mode!r}"] if self.eps_mode is not None else []
        parts += ["fused=False"] if not self.fused else []
        parts += [f"process_group={self.process_group!r}"] if self.process_group is not None else []
        return ", ".join(parts)


def _forward_training(layer: _SynchronizedBatchNorm, input: Tensor, synchronizes: bool) -> Tensor:
    """Normalize by the statistics of the batch, in one of three ways."""
    layer._check_arithmetic(input)
    if type(input) not in (Tensor, nn.Parameter):
        input = input.as_subclass(Tensor)  # the nodes would make views of each other out of a subclass
    if not layer.fused:
        return layer._forward_composite(input, synchronizes)
    x = kernels_of(input.device).laid_out(input)
    if synchronizes and layer._takes_one_node():
        y = layer._forward_one_node(x)
        if y is not None:
            return y
    return layer._forward_three_nodes(x, synchronizes)


_forward_outside_of_graphs = _compiled.outside_of_graphs(_forward_training)


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)
