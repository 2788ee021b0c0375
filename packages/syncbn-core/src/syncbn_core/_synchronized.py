"""What the synchronized layers have in common."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn_comm import ReplicaGroup

from . import _apart, _compiled, _nodes, _statistics, _together
from ._eps import EpsMode, check_eps_mode, resolve_eps_mode
from ._layouts import is_dense
from ._order import chain_of
from ._processes import Processes, Scope, processes_of
from ._replication import Message, Replication, ReplicationContext, in_backward, may_be_intercepted
from ._statistics import check_total, compute_dtype, merge_statistics, samples_per_channel
from ._stock import enlist


class _SynchronizedBatchNorm(_BatchNorm):
    """What the synchronized layers have in common, with the override points of a fork.

    Every attribute beyond those of ``nn.BatchNorm*d`` has a default here, so that an ``nn.BatchNorm2d``
    becomes a ``SynchronizedBatchNorm2d`` by a change of its class alone.
    """

    process_group: Any = None
    eps_mode: EpsMode | None = None
    fused: bool = True

    _dims: tuple[int, ...] = (2, 3, 4, 5)
    _layer_name: str | None = None
    _replication: Replication | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *,
        eps_mode: EpsMode | None = None,
        fused: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_features < 1:
            raise ValueError(f"expected num_features of at least 1, got {num_features}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # an argument that torch's own layers have in its later versions
            self.register_parameter("bias", None)
        self.process_group = process_group
        self.eps_mode = None if eps_mode is None else check_eps_mode(eps_mode)
        self.fused = fused

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, ``(N, C, *)``; in training by the statistics of all replicas' batches."""
        self._check_input(input)
        if torch.compiler.is_compiling() and _compiled.is_traceable(self):
            return _compiled.forward(self, input)
        of_batch = self.training or self.running_mean is None
        clamps = resolve_eps_mode(self.eps_mode) == "clamp"
        processes = self._processes() if self.training else None
        synchronizes = processes is not None or (self.training and self._group() is not None)
        if not synchronizes and not clamps and (input.numel() or not of_batch):
            return super().forward(input)
        if not of_batch:
            return self._forward_running(input)
        forward = self._forward_training
        if torch.compiler.is_compiling():  # a graph break: no graph holds what other threads do
            forward = _compiled.outside_of_graphs(forward)
        return forward(input, synchronizes, processes)

    def _group(self) -> ReplicaGroup | None:
        """The replicas of this process, where there are several."""
        return self._replication.group if self._replication is not None else None

    def _processes(self) -> Processes | None:
        return processes_of(self.process_group, self._where())

    def _forward_running(self, input: Tensor) -> Tensor:
        """Evaluation in eps mode "clamp", by the running statistics."""
        var = self.running_var.clamp(min=self.eps)  # type: ignore[union-attr]
        return nn.functional.batch_norm(input, self.running_mean, var, self.weight, self.bias, eps=0.0)

    def _forward_training(self, input: Tensor, synchronizes: bool, processes: Processes | None) -> Tensor:
        name = self._where()
        if not self.fused:
            mean, invstd = self._agree(input, _statistics.local_statistics(input), synchronizes)
            return _statistics.normalize(input, mean, invstd, self.weight, self.bias)
        if synchronizes and self._is_plain(input):
            y = self._forward_at_once(input, processes)
            if y is not None:
                return y
        x, statistics = _nodes.gather(input, name)
        agreed = self._agree(x, statistics, synchronizes)
        return _nodes.apply(x, agreed, self.weight, self.bias, name)

    def _forward_at_once(self, input: Tensor, processes: Processes | None) -> Tensor | None:
        """The output, where one node can do what else takes three for every replica."""
        place = self._place()
        if place.nested:
            return None
        if place.group is not None and processes is None and _together.is_small(input):
            y: Tensor | None = place.meet(_together.Input(input), self._master)
            return y
        if not (input.numel() and is_dense(input)):
            return None
        share = _apart.enter(input)
        if place.group is None:
            return _apart.reduce([share], self._apart_reduction(input, processes))[0].y
        output: _apart.Output | None = place.meet(share, self._master)
        return None if output is None else _apart.leave(output, input, self.weight, self.bias, self.eps)

    def _is_plain(self, input: Tensor) -> bool:
        """Whether nothing is asked for but what torch's own layer does on a CPU.

        Nothing may be recomputed either, and what is saved for backward not be intercepted, as in a gradient
        checkpoint: it is not always saved by the thread that this is.
        """
        dtype = compute_dtype(input.dtype)
        return (
            input.is_cpu
            and all(t is None or t.dtype == dtype for t in (self.weight, self.bias, self.running_mean))
            and resolve_eps_mode(self.eps_mode) == "plus"
            and _is_own(self._data_parallel_master, _SynchronizedBatchNorm._data_parallel_master)
            and _is_own(self._compute_mean_std, _SynchronizedBatchNorm._compute_mean_std)
            and torch.is_grad_enabled()
            and not in_backward()
            and not may_be_intercepted()
        )

    def _agree(self, x: Tensor, statistics: Tensor, synchronizes: bool) -> Tensor:
        """What to normalise with: see `_data_parallel_master`."""
        message = Message(statistics, samples_per_channel(x), x.dtype)
        if not synchronizes:
            return self._data_parallel_master([(0, message)])[0][1]
        return self._place().agree(message, self._master, recomputable=self.fused)

    def _place(self) -> Replication:
        """This replica's place among the others, or alone."""
        if self._replication is None:
            self._replication = Replication(None, 0, self._where())
        return self._replication

    def _master(self, intermediates: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Answer the messages of all replicas; runs in the thread of replica 0.

        Returns:
            For every `Message`, what was agreed on; for every `_together.Input`, the output; for every
            `_apart.Share`, the output still to be written. None for everybody, if the messages are of several
            kinds or do not suit each other: then all come again, with a `Message`.
        """
        ranks, messages = zip(*intermediates)
        kinds = set(map(type, messages))
        if kinds == {Message}:
            return self._data_parallel_master(intermediates)
        answers: Sequence[Any] | None = None
        if kinds == {_together.Input}:
            answers = self._forward_together([message.x for message in messages])
        elif kinds == {_apart.Share}:
            answers = self._forward_apart(messages)
        return list(zip(ranks, answers or [None] * len(ranks)))

    def _forward_together(self, inputs: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """Normalise the inputs of all replicas as one batch, if one can be made of them."""
        if sum(map(samples_per_channel, inputs)) < 2 or not _together.fit_together(inputs):
            return None
        move = self._move_running_statistics
        return _together.batch_norm(inputs, self.weight, self.bias, self.eps, move, self._where())

    def _forward_apart(self, shares: Sequence[_apart.Share]) -> Sequence[_apart.Output] | None:
        """Prepare the outputs of all replicas, each of which has a batch of its own."""
        processes = self._processes()
        dtypes = {share.x.dtype for share in shares}
        if len(dtypes) > 1 or (processes is None and sum(share.samples for share in shares) < 2):
            return None
        return _apart.reduce(shares, self._apart_reduction(shares[0].x, processes))

    def _apart_reduction(self, first: Tensor, processes: Processes | None) -> _apart.Reduction:
        return _apart.Reduction(
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            move=self._move_running_statistics,
            name=self._where(),
            processes=processes,
            chain=chain_of(first, self._group()) if processes is not None else None,
        )

    def _data_parallel_master(self, intermediates: Sequence[tuple[int, Message]]) -> list[tuple[int, Tensor]]:
        """Reduce the statistics of all replicas; runs once per call of the layer, in the thread of replica 0.

        Args:
            intermediates: ``[(0, message), (1, message), ...]``.

        Returns:
            ``[(0, agreed), (1, agreed), ...]``: what to normalise with, on the replica's own device. With
            ``fused=False`` these are mean and invstd, ``(2, C)``; else vectors for the kernels.

        Raises:
            TypeError: the replicas' inputs differ in dtype.
            ValueError: one value per channel in all replicas together has no variance.
            BrokenSyncError: another process failed or did not come.
        """
        ranks, messages = zip(*intermediates)
        dtypes = {message.dtype for message in messages}
        if len(dtypes) > 1:
            got = ", ".join(f"{m.dtype} in replica {rank}" for rank, m in intermediates)
            raise TypeError(f"expected inputs of one dtype in all replicas at {self._where()!r}, got {got}")
        counts = [message.samples for message in messages]
        samples = sum(counts)
        parts = [message.statistics for message in messages]
        processes = self._processes() if self.training else None

        def finish(mean: Tensor, m2: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
            # Where these replicas have enough samples, nobody has to read the count of all processes.
            total = samples if processes is None or samples > 1 else int(count)
            check_total(total, self._where())
            if total == 0:  # nothing to learn from, nothing to normalise
                return mean, torch.ones_like(mean)
            return self._compute_mean_std(mean, m2, count)

        if self.fused:
            how = _nodes.Reduction(
                counts=counts,
                dtype=compute_dtype(dtypes.pop()),
                finish=finish,
                weight=self.weight,
                bias=self.bias,
                min_var=self._min_var(),
                name=self._where(),
                processes=processes,
                chain=chain_of(parts[0], self._group()) if processes is not None else None,
            )
            results: Sequence[Tensor] = _nodes.merge(parts, how)
        else:
            device = parts[0].device
            mean, m2 = merge_statistics([part.to(device, non_blocking=True) for part in parts], counts)
            count: int | Tensor = samples
            if processes is not None:
                mean, m2, count = processes.merge_with_gradient(mean, m2, samples)
            mean_invstd = torch.stack(finish(mean, m2, count))
            results = [mean_invstd.to(part.device, non_blocking=True) for part in parts]
        return list(zip(ranks, results))

    def _compute_mean_std(self, mean: Tensor, m2: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        """Move the running statistics, and return what to normalise with.

        An override that normalises by another formula wants ``fused=False``: the fused backward is that of
        this one.

        Args:
            mean: ``(C,)``, of the whole batch.
            m2: ``(C,)``, the sum of squared deviations from it.
            count: the number of samples behind it; of several processes perhaps as a tensor, ``(1,)``.

        Returns:
            mean and invstd, ``(C,)`` each.
        """
        self._move_running_statistics(mean.detach(), m2.detach() / (count - 1))
        var = m2 / count
        if resolve_eps_mode(self.eps_mode) == "clamp":
            return mean, var.clamp(min=self.eps).rsqrt()
        return mean, (var + self.eps).rsqrt()

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, unbiased_var: Tensor) -> None:
        running_mean = self.running_mean
        if running_mean is None:
            return
        step: Any = self.momentum
        tracked = self.num_batches_tracked
        if tracked is not None:
            tracked.add_(1)
            if step is None:  # the cumulative average; the counter may be on a GPU, so it is not read
                step = 1.0 / tracked.to(mean.dtype)
        for running, new in ((running_mean, mean), (self.running_var, unbiased_var)):
            if running is not None:
                # In place: what replica 0 writes here is the model's own storage.
                running.lerp_(_as(running, new), _as(running, step) if isinstance(step, Tensor) else step)

    def _min_var(self) -> float:
        return self.eps if resolve_eps_mode(self.eps_mode) == "clamp" else 0.0

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

    def __data_parallel_replicate__(self, ctx: ReplicationContext, copy_id: int) -> None:
        """Take the place of replica ``copy_id`` in this forward; called on every replica, the master first.

        A context of some other library that knows no group changes nothing: then the replicas find each other
        as under a stock ``nn.DataParallel``.
        """
        if getattr(ctx, "group", None) is not None:
            nested = self._replication is not None and self._replication.nested  # found in its making
            self._replication = Replication(ctx, copy_id, ctx.name or self._where(), nested)

    def _replicate_for_data_parallel(self) -> Self:
        nested = self._replication is not None and self._replication.group is not None
        replica = self.__new__(type(self))
        # As nn.Module's own, which sets one by one what it exchanges, and takes three times as long.
        replica.__dict__.update(
            self.__dict__,
            _parameters={},
            _buffers=self._buffers.copy(),
            _modules=self._modules.copy(),
            _is_replica=True,
            _replication=enlist(self, self._where(), nested),
        )
        return replica

    def _where(self) -> str:
        """The layer's name for messages: in the model where it is known, else its class."""
        if self._replication is not None:
            return self._replication.name
        return self._layer_name or type(self).__name__

    def _check_input(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(_compiled.not_a_tensor(input, self._where()))
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels (num_features) at {self._where()!r}, got "
                f"{input.shape[1]} in an input of shape {tuple(input.shape)}"
            )
        if not input.is_floating_point():
            raise TypeError(f"expected a floating-point input at {self._where()!r}, got {input.dtype}")

    def _check_input_dim(self, input: Tensor) -> None:
        if not self._dims[0] <= input.dim() <= self._dims[-1]:
            dims = " or ".join(f"{d}D" for d in self._dims)
            raise ValueError(
                f"expected {dims} input at {self._where()!r}, got {input.dim()}D input of shape "
                f"{tuple(input.shape)}"
            )

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, after those of torch's own layer."""
        parts = [super().extra_repr()]  # type: ignore[no-untyped-call]
        parts += [f"eps_mode={self.eps_mode!r}"] if self.eps_mode is not None else []
        parts += ["fused=False"] if not self.fused else []
        parts += [f"process_group={self.process_group!r}"] if self.process_group is not None else []
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        state = self._state_outside_a_forward()
        if not isinstance(self.process_group, Scope):
            state.pop("process_group", None)  # belongs to this process; nothing of it can be written down
        return state

    def __copy__(self) -> Self:
        clone = self.__new__(type(self))
        clone.__dict__.update(self._state_outside_a_forward())
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SynchronizedBatchNorm":
        memo[id(self.process_group)] = self.process_group
        clone = memo[id(self)] = self.__new__(type(self))
        clone.__setstate__(copy.deepcopy(self._state_outside_a_forward(), memo))  # type: ignore[no-untyped-call]
        return clone

    def _state_outside_a_forward(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_replication"}


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _is_own(method: Any, own: Any) -> bool:
    """Whether a layer's method is this class's own, not that of a subclass or of the very object."""
    return getattr(method, "__func__", None) is own
